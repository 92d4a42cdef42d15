"""A headless Chromium for tests, the one that is installed on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
"""Chromium refuses to run as root with its sandbox; the others keep it from the network of its own accord."""


def find_chromium() -> str | None:
    """$CHROMIUM, else the first of NAMES on the path."""
    given = os.environ.get("CHROMIUM")
    return given or next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright. Skips where there is no Chromium."""
    path = find_chromium()
    if path is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is on the path; `make browser` installs one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and all that it said and asked for since it was opened."""

    page: Any
    messages: list[str] = field(default_factory=list)
    """Console errors and warnings, uncaught exceptions."""
    requests: list[str] = field(default_factory=list)
    """Addresses other than the file itself."""


@contextmanager
def opened(browser: Any, file: Path, *, width: int = 1100, **context: Any) -> Iterator[Opened]:
    """``file`` in a fresh context. No request but the one for the file is let through."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **context).new_page()
    found = Opened(page=page)
    address = file.resolve().as_uri()

    def pass_on(route: Any) -> None:
        if route.request.url == address:
            route.continue_()
            return
        found.requests.append(route.request.url)
        route.abort()

    page.route("**/*", pass_on)
    page.on("console", lambda message: _note(found, message))
    page.on("pageerror", lambda error: found.messages.append(str(error)))
    page.goto(address)
    yield found
    page.context.close()


def _note(found: Opened, message: Any) -> None:
    if message.type in ("error", "warning"):
        found.messages.append(message.text)


def enliven(page: Any) -> None:
    """Scroll every chart into view and wait until each is alive."""
    for figure in page.query_selector_all("figure.chart"):
        if figure.evaluate("figure => figure.closest('details:not([open])') === null"):
            figure.evaluate("figure => figure.scrollIntoView({behavior: 'instant'})")
            page.wait_for_function("figure => figure.dataset.live === 'yes'", arg=figure)


def contrasts(page: Any) -> list[tuple[float, str]]:
    """(contrast, text) of every piece of visible text, SVG included, by the definition of WCAG 2."""
    return [(item["ratio"], item["text"]) for item in page.evaluate(CONTRASTS)]


CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.closest("script, .skip") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const [a, b] = [numbers(element.closest("svg") ? style.fill : style.color), behind(element)].map(light);
    found.push({ text, ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) });
  }
  return found;
}"""
