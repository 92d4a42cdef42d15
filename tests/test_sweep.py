"""`toolchain sweep`: grids of tiny models, killed, changed, failing; judged by the engines' own files."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import Ran
from tests.sweeps import GRID, NAMES, make_root, rows, write_spec
from toolchain.cli.main import _run, main
from toolchain.core.files import sha256_file
from toolchain.core.progress import Silent
from toolchain.pipeline import inputs
from toolchain.pipeline.sweep import executors
from toolchain.pipeline.sweep.cells import cells_of
from toolchain.pipeline.sweep.executors import Ended, Job
from toolchain.pipeline.sweep.front import standings
from toolchain.pipeline.sweep.place import Place
from toolchain.pipeline.sweep.run import Run as SweepRun
from toolchain.pipeline.sweep.run import run_sweep
from toolchain.pipeline.sweep.spec import read_sweep

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def root(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tiny("qwen3_moe"), tmp_path_factory.mktemp("sweep"))


def in_process(job: Job, progress: Any) -> Ended:
    """The command of a cell without the seconds that a new interpreter takes."""
    words = list(job.command[job.command.index("sweep") :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["toolchain", *words])
        return Ended(name=job.name, status=_run(words, io.StringIO()), last_words="")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "run_job", in_process)


@pytest.fixture(scope="module")
def killed(root: Path) -> dict[str, Any]:
    """A sweep that was killed, with -9, in its second cell; how it was then, and what its process had started."""
    output = root / "sweeps" / "grid"
    words = ["sweep", str(write_spec(root, "grid")), "--output", str(output)]
    code = "from toolchain.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while not (output / "engines" / NAMES[1]).is_dir():
        assert process.poll() is None and time.monotonic() - started < 120, process.communicate()
        time.sleep(0.02)
    cells = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(cells, timeout=20)
    return {
        "output": output,
        "started": len(cells),
        "alive": alive,
        "document": json.loads((output / "sweep.json").read_text()),
        "files": state_of(output / "engines" / NAMES[0]),
    }


@pytest.fixture(scope="module")
def done(killed: dict[str, Any], root: Path) -> dict[str, Any]:
    """The same after the same command was given once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "run_job", in_process)
        with pytest.raises(SystemExit) as end:
            main(["sweep", str(root / "grid.yaml"), "--output", str(killed["output"])])
    assert not end.value.code
    return {**killed, "after": json.loads((killed["output"] / "sweep.json").read_text())}


def state_of(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_killed_sweep_leaves_a_partial_table_and_no_process(killed: dict[str, Any]) -> None:
    assert killed["started"] == 1 and killed["alive"] == []
    states = [row["state"] for row in killed["document"]["cells"]]
    assert states[0] == "finished" and set(states[1:]) <= {"waiting", "begun"}
    assert killed["document"]["cells"][0]["kl_mean"] > 0


def test_the_same_command_goes_on_and_leaves_finished_cells_alone(done: dict[str, Any], root: Path) -> None:
    assert [row["cell"] for row in done["after"]["cells"]] == NAMES
    assert {row["state"] for row in done["after"]["cells"]} == {"finished"}
    assert state_of(done["output"] / "engines" / NAMES[0]) == done["files"]
    assert yaml.safe_load((done["output"] / "spec.yaml").read_text())["formats"] == GRID["formats"]


def test_cells_are_what_quantize_writes(done: dict[str, Any], root: Path, toolchain: Run) -> None:
    """The one that was killed in the middle, and one of another format."""
    texts = ("--calib-data", root / "texts.txt", "--calib-samples", 8, "--calib-length", 64)
    for name, format in ((NAMES[1], "w4a16_nvfp4"), (NAMES[3], "nvfp4")):
        alone = root / "alone" / format
        ran = toolchain(
            "quantize", root / "model", "--format", format, "--recipe", "mse", *texts, "--output", alone
        )
        assert ran.status == 0, ran.err
        for shard in alone.glob("*.safetensors"):
            made = done["output"] / "engines" / name / "checkpoint" / shard.name
            assert made.read_bytes() == shard.read_bytes()


def test_the_table_says_what_the_engines_say(done: dict[str, Any]) -> None:
    table = {
        row["cell"]: row for row in csv.DictReader(io.StringIO((done["output"] / "table.csv").read_text()))
    }
    page = (done["output"] / "table.md").read_text()
    for name, row in rows(done["after"]).items():
        engine = done["output"] / "engines" / name
        metrics, plan = (json.loads((engine / file).read_text()) for file in ("metrics.json", "plan.json"))
        for key in ("ppl", "kl_mean", "top1_agreement", "router_agreement", "baseline_ppl", "tokens"):
            assert row[key] == metrics[key]
            assert float(table[name][key]) == metrics[key]
        assert row["kl_mean_interval"] == metrics["intervals"]["kl_mean"]
        assert float(table[name]["kl_mean_low"]) == metrics["intervals"]["kl_mean"][0]
        size = sum(path.stat().st_size for path in (engine / "checkpoint").glob("*.safetensors"))
        assert row["bytes"] == size and row["compression"] == plan["estimates"]["source_bytes"] / size
        records = [json.loads(path.read_text()) for path in (engine / "stages").glob("*.json")]
        assert row["seconds"] == pytest.approx(sum(record["seconds"] for record in records))
        assert row["peak_memory_bytes"] == max(record["peak_memory_bytes"] for record in records)
        assert row["gates"] == [] and row["starved_experts"] in (None, 0) and row["policy"] == "experts-only"
        assert f"| {name} |" in page and f"{metrics['ppl']:.1f}" in page


def test_finished_cells_are_skipped_without_a_process(
    done: dict[str, Any], root: Path, toolchain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "run_job", lambda *_: pytest.fail("a finished cell was run"))
    ran = toolchain("sweep", root / "grid.yaml", "--output", done["output"], "--json")
    assert ran.status == 0 and ran.json == done["after"]
    assert ran.err.count("finished before, skipped") == 4
    shown = toolchain("sweep", root / "grid.yaml", "--output", done["output"], "--table")
    assert shown.status == 0 and all(name in shown.out for name in NAMES)
    assert (
        toolchain("sweep", root / "grid.yaml", "--output", done["output"], "--table", "--json").json
        == ran.json
    )
    listed = toolchain("sweep", root / "grid.yaml", "--output", done["output"], "--dry-run", "--json").json
    assert {row["state"] for row in listed["cells"]} == {"finished"}


@pytest.mark.usefixtures("quick")
def test_an_axis_more_keeps_finished_cells(
    done: dict[str, Any], root: Path, tmp_path: Path, toolchain: Run
) -> None:
    output = tmp_path / "more"
    shutil.copytree(
        done["output"], output
    )  # other paths: each cell goes through its stages once, which all hold
    spec = write_spec(
        root, "more", kv_cache=["none", "fp8_cast"], exclude=[{"format": "nvfp4", "recipe": "mse"}]
    )
    ran = toolchain("sweep", spec, "--output", output, "--json")
    assert ran.status == 0, ran.err
    found = rows(ran.json)
    added = {
        "small-w4a16_nvfp4-kv_fp8_cast-max",
        "small-w4a16_nvfp4-kv_fp8_cast-mse",
        "small-nvfp4-kv_fp8_cast-max",
    }
    assert set(found) == {*NAMES[:3], *added} and {row["state"] for row in found.values()} == {"finished"}
    for name in NAMES[:3]:
        assert found[name]["kl_mean"] == rows(done["after"])[name]["kl_mean"]
        assert found[name]["seconds"] == rows(done["after"])[name]["seconds"], "its stages were not run again"


@pytest.mark.usefixtures("quick")
def test_what_fails_and_what_is_the_same(root: Path, tmp_path: Path, toolchain: Run) -> None:
    """A cell with too little text, one with a gate that cannot be passed, and one with the plan of another."""
    spec = write_spec(
        root, "mixed", formats=["nvfp4"], recipes=["max", "default"],
        include=[
            {"model": "small", "format": "fp8", "calib_length": 8192},
            {"model": "small", "format": "w4a16_nvfp4", "max_kl": 1e-9},
        ],
    )  # fmt: skip
    ran = toolchain("sweep", spec, "--output", tmp_path / "sweep", "--json")
    assert ran.status == 1
    found = rows(ran.json)
    failed = found["small-fp8-calib_length_8192"]
    assert failed["state"] == "failed" and failed["error"]["code"] == "TC-204" and failed["kl_mean"] is None
    same = found["small-nvfp4-default"]
    assert (same["state"], same["same_as"]) == ("same", "small-nvfp4-max")
    assert same["kl_mean"] == found["small-nvfp4-max"]["kl_mean"]
    assert not (tmp_path / "sweep" / "engines" / "small-nvfp4-default").exists()
    unfit = found["small-w4a16_nvfp4-max_kl_1e-09"]
    assert unfit["state"] == "finished" and [gate["passed"] for gate in unfit["gates"]] == [False]
    assert "failed max_kl" in (tmp_path / "sweep" / "table.md").read_text()

    spec.write_text(spec.read_text().replace("8192", "64"))
    again = toolchain("sweep", spec, "--output", tmp_path / "sweep", "--json")
    assert again.status == 0 and again.err.count("finished before, skipped") == 2
    assert rows(again.json)["small-fp8"]["state"] == "finished"


def test_a_process_that_dies_takes_only_its_cell(root: Path, tmp_path: Path) -> None:
    """Processes end before they write a record: by a signal, with an exit status, and for another run's sake."""
    cells = cells_of(
        read_sweep(write_spec(root, "dying", formats=["nvfp4"], recipes=["max", "mse", "compensate"]))
    )
    words = ("os.kill(os.getpid(), 9)", "sys.exit('no memory left')", "sys.exit('error TC-008: another run')")
    deaths = {cell.name: word for cell, word in zip(cells, words, strict=True)}
    found = run_sweep(
        SweepRun(place=Place(directory=tmp_path / "sweep"), until="quantize", force=False, progress=Silent()),
        cells,
        cells,
        spec="",
        command=lambda name: (sys.executable, "-c", f"import os, sys; {deaths[name]}"),
        executor=executors.LocalCells(),
        skip_refused=False,
    )
    first, second, third = found["cells"]
    assert third["state"] == "waiting", "its outcome is that of the run that has it"
    assert first["state"] == second["state"] == "failed"
    assert first["error"]["code"] == "TC-183" and "SIGKILL" in first["error"]["message"]
    assert "no memory left" in second["error"]["message"]
    assert (tmp_path / "sweep" / "cells" / f"{cells[1].name}.log").read_text() == "no memory left\n"


def test_refused_cells_are_all_told_before_anything_runs(root: Path, tmp_path: Path, toolchain: Run) -> None:
    spec = write_spec(
        root, "refused", formats=["nvfp4", "fp8", "nvfp5"], recipes=["mse"], kv_cache=["none", "fp9"]
    )
    output = tmp_path / "sweep"
    dry = toolchain("sweep", spec, "--output", output, "--dry-run", "--json")
    codes = {row["cell"]: (row["error"] or {}).get("code") for row in dry.json["cells"]}
    assert dry.status == 2 and codes == {
        "small-nvfp4-mse": None,
        "small-nvfp4-kv_fp9-mse": "TC-107",
        "small-fp8-mse": "TC-108",
        "small-fp8-kv_fp9-mse": "TC-107",
        "small-nvfp5-mse": "TC-101",
        "small-nvfp5-kv_fp9-mse": "TC-107",
    }
    ran = toolchain("sweep", spec, "--output", output, "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-180"
    assert len(ran.json["error"]["findings"]) == 5 and not output.exists()
    assert toolchain("sweep", spec, "--output", output, "--dry-run", "--skip-refused").status == 0


@pytest.mark.usefixtures("quick")
def test_one_cell_by_name_or_number(root: Path, tmp_path: Path, toolchain: Run) -> None:
    """As the jobs of an array do; a refused one is the exit status 2 of its job."""
    spec = write_spec(root, "one", formats=["w4a16_nvfp4", "fp8"], base={"eval_tokens": 256})
    output = tmp_path / "sweep"
    ran = toolchain("sweep", spec, "--output", output, "--cell", 2, "--until", "quantize", "--json")
    assert ran.status == 0, ran.err
    assert (ran.json["cell"], ran.json["state"], ran.json["kl_mean"]) == (NAMES[1], "finished", None)
    assert not (output / "engines" / NAMES[1] / "metrics.json").exists()
    refused = toolchain("sweep", spec, "--output", output, "--only", "small-fp8-mse", "--json")
    assert refused.status == 2 and refused.json["error"]["code"] == "TC-108"
    measured = toolchain("sweep", spec, "--output", output, "--only", NAMES[1], "--json")
    assert (
        measured.status == 0
        and measured.json["kl_mean"] > 0
        and "quantize: unchanged, skipped" in measured.err
    )
    states = [row["state"] for row in json.loads((output / "sweep.json").read_text())["cells"]]
    assert states == ["waiting", "finished", "waiting", "refused"]
    shutil.rmtree(output / "engines" / NAMES[1] / "checkpoint")
    again = toolchain("sweep", spec, "--output", output, "--only", NAMES[1])
    assert again.status == 0 and "finished before" not in again.err, "its checkpoint was gone"
    unknown = toolchain("sweep", spec, "--output", output, "--only", "small-fp4", "--json")
    assert unknown.status == 2 and unknown.json["error"]["code"] == "TC-182"
    assert (
        toolchain("sweep", spec, "--output", output, "--cell", 5, "--json").json["error"]["code"] == "TC-182"
    )


def test_a_changed_text_makes_a_cell_run_again(done: dict[str, Any], root: Path, toolchain: Run) -> None:
    held_out = root / "model" / "evaluation.jsonl"
    before = held_out.read_text()
    listing = ("sweep", root / "grid.yaml", "--output", done["output"], "--dry-run", "--json")
    try:
        held_out.write_text(before.replace("def g", "def h"))
        assert {row["state"] for row in toolchain(*listing).json["cells"]} == {"to run"}
    finally:
        held_out.write_text(before)
    assert {row["state"] for row in toolchain(*listing).json["cells"]} == {"finished"}


@pytest.mark.usefixtures("quick")
def test_a_model_is_hashed_once(
    root: Path, tmp_path: Path, toolchain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once per cell: hashing 1 TB takes an hour."""
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(inputs, "REMEMBERED_BYTES", 10_000)
    monkeypatch.setattr(inputs, "sha256_file", counting)
    spec = write_spec(root, "hashes", formats=["w4a16_nvfp4"])
    ran = toolchain("sweep", spec, "--output", tmp_path / "sweep", "--until", "quantize", "--json")
    assert [row["state"] for row in ran.json["cells"]] == ["finished", "finished"]
    assert hashed.count("model.safetensors") == 1 and hashed.count("config.json") == 2


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"format": ["nvfp4"], "formats": None, "recipies": ["max"]}, "TC-007", "'recipies' (did you mean 'recipes'?)"),
        ({"base": {"calib_sample": 8}}, "TC-007", "'calib_sample' (did you mean 'calib_samples'?)"),
        ({"format": ["fp8"]}, "TC-007", "format is given twice"),
        ({"formats": []}, "TC-007", "axis format has no value"),
        ({"formats": ["fp8", "fp8"]}, "TC-007", "axis format has 'fp8' twice"),
        ({"models": None}, "TC-007", "does not say which models"),
        ({"exclude": {"format": "fp8"}}, "TC-007", "exclude is dict, expected a list"),
        ({"exclude": [{"format": "int4"}]}, "TC-184", "leaves out no cell"),
        ({"exclude": [{"format": GRID["formats"]}]}, "TC-184", "no cell over"),
        ({"include": [{"model": "small", "format": "nvfp4", "recipe": "max"}]}, "TC-181", "the same cell twice"),
        ({"name": "../elsewhere"}, "TC-007", "name '../elsewhere'"),
        ({"models": ["a/model", "b/model"]}, None, ""),
    ],
)  # fmt: skip
def test_specs_that_make_no_sense(
    root: Path, toolchain: Run, changes: dict[str, Any], code: str | None, words: str
) -> None:
    ran = toolchain("sweep", write_spec(root, "wrong", **changes), "--table", "--json")
    assert ran.status == 2
    assert ran.json["error"]["code"] == (code or "TC-182") and words in ran.json["error"]["message"]


def test_directories_of_one_name_need_labels(root: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name / "model").mkdir(parents=True)
    models = [str(tmp_path / name / "model") for name in ("first", "second")]
    with pytest.raises(Exception, match="cells that have one name: model-nvfp4"):
        cells_of(read_sweep(write_spec(root, "same", models=models, formats=["nvfp4"], recipes=None)))
    labelled = dict(zip(("one", "two"), models, strict=True))
    spec = write_spec(root, "same", models=labelled, formats=["nvfp4"], recipes=None)
    assert [cell.name for cell in cells_of(read_sweep(spec))] == ["one-nvfp4", "two-nvfp4"]


def test_a_directory_that_is_no_sweep_is_refused(root: Path, tmp_path: Path, toolchain: Run) -> None:
    (tmp_path / "thesis.tex").write_text("")
    ran = toolchain("sweep", write_spec(root, "foreign"), "--output", tmp_path, "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-004"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_sweep_that_cannot_compare_is_refused(root: Path, tmp_path: Path, toolchain: Run) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(root / "model", bare, ignore=shutil.ignore_patterns("evaluation.jsonl"))
    spec = write_spec(root, "bare", models=[str(bare)], formats=["w4a16_nvfp4"], recipes=["max"])
    ran = toolchain("sweep", spec, "--output", tmp_path / "sweep", "--json")
    assert ran.status == 2 and ran.json["error"]["findings"][0]["code"] == "TC-520"
    assert (
        toolchain("sweep", spec, "--until", "quantize", "--output", tmp_path / "sweep", "--dry-run").status
        == 0
    )


def row(cell: str, size: int, low: float, high: float, group: str = "a") -> dict[str, Any]:
    mean = (low + high) / 2
    return {
        "cell": cell, "bytes": size, "kl_mean": mean, "kl_mean_interval": [low, high], "measured_alike": group
    }  # fmt: skip


def test_the_front_and_what_noise_leaves_open() -> None:
    found = standings(
        [
            row("small", 10, 0.5, 0.6),
            row("small, about as good", 10, 0.55, 0.65),
            row("larger, better", 20, 0.1, 0.2),
            row("larger, about the same", 20, 0.15, 0.35),
            row("large and bad", 30, 0.8, 0.9),
            row("another text", 30, 0.8, 0.9, group="b"),
            {**row("one window", 40, 0.0, 0.0, group="b"), "kl_mean_interval": None},
        ]
    )
    assert {name: standing.mark for name, standing in found.items()} == {
        "small": "front ~",
        "small, about as good": "~",
        "larger, better": "front ~",
        "larger, about the same": "~",
        "large and bad": "",
        "another text": "front",
        "one window": "front ~",
    }
    assert found["larger, better"].not_told_apart == ("larger, about the same",)
    assert set(found["large and bad"].beaten_by) == {
        "small", "small, about as good", "larger, better", "larger, about the same"
    }  # fmt: skip
