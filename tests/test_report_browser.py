"""Reports opened in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium, contrasts, enliven, opened
from tests.report_engines import change, make_engine, write
from toolchain.report import write_comparison, write_report

pytestmark = pytest.mark.browser
KINDS = ("moe", "dense", "big", "old", "bare", "hostile", "compared")
HOSTILE = (
    '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1"> {{ 7*7 }} & "quoted"'
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of this file alone: while Playwright's synchronous interface is open, nothing else here can run asyncio."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``moe`` and ``fp8`` have everything; ``old`` is as the first version wrote it; ``bare`` has a plan alone."""
    root = tmp_path_factory.mktemp("engines")
    make_engine(root / "moe", training=True)
    make_engine(root / "fp8", format="fp8", kl=0.0009, seed=1)
    make_engine(root / "dense", experts=0, layers=6)
    make_engine(root / "big", layers=94, experts=128)
    old = make_engine(root / "old", bench=False, sensitivity=False)
    coverage = json.loads((old / "checkpoint" / "coverage.json").read_text())
    (old / "checkpoint" / "coverage.json").unlink()
    counts = {path: layer["tokens"] for path, layer in coverage["layers"].items()}
    change(old / "checkpoint" / "quantize.json", coverage=counts)
    metrics = json.loads((old / "metrics.json").read_text())
    kept = (
        "tokens",
        "ppl",
        "baseline_ppl",
        "kl_mean",
        "kl_median",
        "kl_p99",
        "top1_agreement",
        "router_agreement",
    )
    write(old / "metrics.json", {key: metrics[key] for key in (*kept, "router_agreement_by_layer", "data")})
    write(root / "bare" / "plan.json", json.loads((root / "moe" / "plan.json").read_text()))
    hostile(make_engine(root / "hostile"))
    return root


def hostile(engine: Path) -> None:
    """Every text that a model, a prompt, a file name or a finding can bring."""
    generation = {"prompt": HOSTILE, "baseline": HOSTILE, "quantized": f"{HOSTILE}!", "tokens": 9}
    change(engine / "metrics.json", generations=[generation], baseline=HOSTILE)
    finding = {"code": HOSTILE, "where": HOSTILE, "message": HOSTILE, "severity": "error"}
    change(engine / "verify.json", findings=[finding], passed=False)
    plan = json.loads((engine / "plan.json").read_text())
    for item in plan["assignments"]:
        item["role"] = item["role"] if item["role"] == "routed_expert" else f"{HOSTILE}{item['role']}"
        item["reason"] = HOSTILE
    change(engine / "plan.json", assignments=plan["assignments"], architecture=HOSTILE, model=HOSTILE)
    change(engine / "engine.json", command=["toolchain", HOSTILE], versions={HOSTILE: HOSTILE})


@pytest.fixture(scope="session")
def page_of(engines: Path) -> Callable[[str], Path]:
    """File of the report of a kind, written once."""
    written: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in written:
            several = [engines / "moe", engines / "fp8", engines / "old"]
            written[kind] = (
                write_comparison(several, engines / "compared")
                if kind == "compared"
                else write_report(engines / kind)
            )
        return written[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_opens_without_errors_and_asks_for_nothing(
    browser: Any, page_of: Callable[[str], Path], kind: str
) -> None:
    with opened(browser, page_of(kind)) as found:
        enliven(found.page)
        assert found.messages == []
        assert found.requests == []
        assert found.page.evaluate("window.hacked") is None


def test_the_page_forbids_requests_itself(browser: Any, page_of: Callable[[str], Path]) -> None:
    with opened(browser, page_of("moe")) as found:
        tried = found.page.evaluate("fetch('https://example.com/').then(() => 'went', () => 'refused')")
        found.page.evaluate(
            "document.body.append(Object.assign(new Image(), {src: 'https://example.com/a.png'}))"
        )
        found.page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<i onclick=\"window.hacked=1\">x</i>')"
        )
        found.page.click("body > i")
        assert tried == "refused"
        assert found.requests == []
        assert found.page.evaluate("window.hacked") is None


@pytest.mark.parametrize("kind", KINDS)
def test_fits_a_phone(browser: Any, page_of: Callable[[str], Path], kind: str) -> None:
    for script in (True, False):
        with opened(browser, page_of(kind), width=390, java_script_enabled=script) as found:
            if script:
                enliven(found.page)
            box = found.page.locator("html").bounding_box()
            widest = found.page.locator("body").evaluate("body => body.scrollWidth") if script else 390
            assert box["width"] <= 390
            assert widest <= 390


@pytest.mark.parametrize("kind", ["moe", "bare", "hostile", "compared"])
def test_text_is_readable_in_both_themes(browser: Any, page_of: Callable[[str], Path], kind: str) -> None:
    with opened(browser, page_of(kind)) as found:
        enliven(found.page)
        for scheme in ("light", "dark"):
            found.page.emulate_media(color_scheme=scheme)
            measured = contrasts(found.page)
            assert len(measured) > 20
            assert min(measured) >= (4.5, ""), min(measured)


def test_themes_by_hand(browser: Any, page_of: Callable[[str], Path]) -> None:
    with opened(browser, page_of("moe")) as found:
        page = found.page
        seen = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
        bar = "getComputedStyle(document.querySelector('#load-shift .picture .mark-rect path')).fill"
        fills = [page.evaluate(bar)]
        button = page.get_by_role("button", name="Theme")
        for name in ("Theme: light", "Theme: dark"):
            button.focus()
            page.keyboard.press("Enter")
            assert button.inner_text() == name
            seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            fills.append(page.evaluate(bar))
        assert seen[0] == seen[1] == "rgb(255, 255, 255)"
        assert seen[2] != seen[0]
        assert fills[0] == fills[1] != fills[2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_chart_is_a_picture_and_comes_to_life(
    browser: Any, page_of: Callable[[str], Path], kind: str
) -> None:
    expected = {"bare": 2, "old": 4, "dense": 7, "compared": 3, "moe": 11}.get(kind, 10)
    with opened(browser, page_of(kind)) as found:
        figures = found.page.query_selector_all("figure.chart")
        assert len(figures) == expected
        enliven(found.page)
        assert all(marks(figure, ".live") for figure in figures)
        assert all(
            len(figure.query_selector(".picture").get_attribute("aria-label")) > 30 for figure in figures
        )


def marks(figure: Any, place: str) -> int:
    """Marks with an extent, inside the picture."""
    return figure.evaluate(
        """(figure, place) => {
          const inside = figure.querySelector(place + ' svg').getBoundingClientRect();
          const marks = [...figure.querySelectorAll(place + ' svg .role-mark path, ' + place + ' svg .role-mark line')];
          return marks.map((mark) => mark.getBoundingClientRect()).filter((box) => box.width + box.height > 1
            && box.left >= inside.left - 8 && box.right <= inside.right + 8).length;
        }""",
        place,
    )


def test_charts_show_the_numbers(browser: Any, page_of: Callable[[str], Path], engines: Path) -> None:
    metrics = json.loads((engines / "moe" / "metrics.json").read_text())
    coverage = json.loads((engines / "moe" / "checkpoint" / "coverage.json").read_text())
    with opened(browser, page_of("moe")) as found:
        page = found.page
        enliven(page)
        boxes = "(at) => [...document.querySelectorAll(at)].map(mark => mark.getBoundingClientRect().height)"
        heights = page.evaluate(boxes, "#load-shift .live .mark-rect path")
        shifts = [layer["load_shift"] for layer in metrics["layers"]]
        for height, shift in zip(heights, shifts, strict=True):
            assert height / max(heights) == pytest.approx(shift / max(shifts), abs=0.02)
        bins = page.evaluate(boxes, "#kl-histogram .live .mark-rect path")
        counts = metrics["kl_histogram"]["counts"]
        held = [index for index, value in enumerate(counts) if value]
        wanted = counts[held[0] : held[-1] + 1]
        assert [height / max(bins) for height in bins] == pytest.approx(
            [value / max(wanted) for value in wanted], abs=0.03
        )
        fills = page.evaluate(
            "[...document.querySelectorAll('#coverage .live .mark-rect path')].map(mark => mark.getAttribute('fill'))"
        )
        tokens = [count for layer in coverage["layers"].values() for count in layer["tokens"]]
        starved = ["--bad" in fill for fill in fills]
        assert starved == [count < coverage["min_tokens_per_expert"] for count in tokens]


@pytest.mark.parametrize("chart", ["kl-histogram", "sensitivity-chart", "strip"])
def test_pictures_have_the_labels_of_live_charts(
    browser: Any, page_of: Callable[[str], Path], chart: str
) -> None:
    """Of axes whose ticks do not depend on the width."""
    with opened(browser, page_of("moe")) as found:
        enliven(found.page)
        labels = "at => [...document.querySelectorAll(at)].map(text => text.textContent).sort()"
        axis = ".role-axis-label text"
        live = found.page.evaluate(labels, f"#{chart} .live {axis}")
        picture = found.page.evaluate(labels, f"#{chart} .picture {axis}")
        assert len(set(live)) > 3
        assert set(picture) == set(live)


def test_a_heat_map_of_a_large_model_has_a_cell_for_every_expert(
    browser: Any, page_of: Callable[[str], Path]
) -> None:
    with opened(browser, page_of("big")) as found:
        enliven(found.page)
        assert found.page.locator("#coverage .live .mark-rect path").count() == 94 * 128
        drawn = found.page.evaluate(
            "[...document.querySelectorAll('#coverage .picture .mark-rect path')]"
            ".map(path => path.getAttribute('d')).join('')"
        )
        assert len(re.findall("M", drawn)) == 94 * 128


def test_tables_sort_by_click_and_by_keyboard(
    browser: Any, page_of: Callable[[str], Path], engines: Path
) -> None:
    document = json.loads((engines / "moe" / "sensitivity.json").read_text())
    by_kl = sorted(document["scores"], key=lambda item: item["kl"])
    with opened(browser, page_of("moe")) as found:
        table = found.page.locator("#sensitivity table").first
        groups = table.locator("tbody td:first-child")
        header = table.locator("th", has_text="KL (nats)")
        header.get_by_role("button").click()
        assert header.get_attribute("aria-sort") == "descending"
        assert groups.all_inner_texts() == [item["group"] for item in reversed(by_kl)]
        header.get_by_role("button").focus()
        found.page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == "ascending"
        assert groups.all_inner_texts() == [item["group"] for item in by_kl]
        first = table.locator("th").first
        first.get_by_role("button").focus()
        found.page.keyboard.press("Space")
        assert groups.all_inner_texts() == sorted(item["group"] for item in by_kl)
        assert header.get_attribute("aria-sort") is None


def test_what_was_not_measured_sorts_last(browser: Any, page_of: Callable[[str], Path]) -> None:
    with opened(browser, page_of("compared")) as found:
        table = found.page.locator("#summary table")
        button = table.locator("th", has_text="Tokens/s").get_by_role("button")
        for _ in range(2):
            button.click()
            assert table.locator("tbody td:first-child").all_inner_texts()[-1] == "old"


def test_reads_without_javascript(browser: Any, page_of: Callable[[str], Path]) -> None:
    with opened(browser, page_of("moe"), java_script_enabled=False) as found:
        page = found.page
        pictures = page.locator("figure.chart .picture svg")
        assert pictures.count() == 11
        assert all(picture.bounding_box()["height"] > 50 for picture in pictures.all())
        assert page.get_by_text("Fit to serve: all 2 gates passed").is_visible()
        assert not page.get_by_role("button", name="Theme").is_visible()
        assert page.locator("figure.chart .live:visible").count() == 0


@pytest.mark.parametrize("kind", ["moe", "compared"])
def test_prints_light_with_its_pictures(browser: Any, page_of: Callable[[str], Path], kind: str) -> None:
    with opened(browser, page_of(kind), color_scheme="dark") as found:
        page = found.page
        enliven(page)
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
        assert page.locator(".live:visible").count() == 0
        assert page.locator(".picture:visible").count() == page.locator("figure.chart").count()
        assert not page.locator("nav").is_visible()
        printed = page.pdf(prefer_css_page_size=True)
        assert printed.startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2
        box = re.search(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)", printed)
        assert box is not None
        paper = float(box[1]) * 96 / 72 - 28 / 25.4 * 96  # CSS pixels between the margins
        assert (paper > 800) == (kind == "compared")
        page.set_viewport_size({"width": int(paper), "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= paper


def test_hostile_text_is_shown_as_it_is(browser: Any, page_of: Callable[[str], Path]) -> None:
    with opened(browser, page_of("hostile")) as found:
        texts = found.page.locator("#generations .said").all_inner_texts()
        assert texts == [HOSTILE, HOSTILE, f"{HOSTILE}!"]
        assert found.page.locator("main img").count() == 0
        enliven(found.page)
        found.page.locator("#strip .live .mark-rect path").last.hover()
        tip = found.page.locator("#vg-tooltip-element")
        assert HOSTILE[:20] in tip.inner_text()
        assert tip.locator("img, script").count() == 0
        assert found.page.evaluate("window.hacked") is None


@pytest.mark.parametrize("kind", ["moe", "bare", "compared"])
def test_accessibility_rules_hold(browser: Any, page_of: Callable[[str], Path], kind: str) -> None:
    """axe-core: roles, names, landmarks, headings, tables, contrast."""
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        with opened(browser, page_of(kind), color_scheme=scheme, bypass_csp=True) as found:
            enliven(found.page)
            result = Axe().run(found.page)
            assert result.violations_count == 0, result.generate_report()
