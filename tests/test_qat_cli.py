"""`toolchain qat` as a user runs it: a trained engine from a model and from an engine, and whatever it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import Made, Ran

Run = Callable[..., Ran]
FEW = ("--steps", 2, "--evaluate-every", 1, "--batch-size", 2, "--length", 64, "--held-out-tokens", 128)
"""Little training: what it gives is another test's business."""


@pytest.fixture
def mine(made: Made, tmp_path: Path) -> Made:
    """An engine and its model that may be changed. Engines name their model by its path: the copy's is told."""
    copy = made.copy_to(tmp_path / "made")
    for path in (copy.engine / "plan.json", *sorted((copy.engine / "stages").glob("*.json"))):
        path.write_text(path.read_text().replace(str(made.root), str(copy.root)))
    return copy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    words = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(40)]
    path.write_text("".join(json.dumps({"text": word * 3}) + "\n" for word in words))
    return path


def calibrated(made: Made) -> tuple[object, ...]:
    return ("--calib-data", made.texts, "--calib-samples", 8, "--calib-length", 64, "--eval-tokens", 256)


def where(root: Path) -> tuple[object, ...]:
    return ("--output", root / "out", "--triton-output", root / "repository")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in ("quantizers.safetensors", "learned_scales.safetensors"):
            found |= load_file(file)
    return found


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_from_a_model(toolchain: Run, made: Made, data: Path, tmp_path: Path) -> None:
    """A trained engine, complete; its trained model is the source's, but for the weights that were trained."""
    command = (
        "qat", made.source, "--format", "nvfp4", "--data", data, *FEW, "--method", "qat", "--patience", 0,
        "--learning-rate", 1e-3, *calibrated(made), *where(tmp_path), "--device", "cpu",
    )  # fmt: skip
    ran = toolchain(*command, "--json")
    assert ran.status == 0, ran.err
    out = tmp_path / "out"
    training = ran.json["training"]
    assert training["method"] == "qat" and training["steps"] == 2 and training["tokens"] == 2 * 2 * 64
    assert training["data"]["sources"] == [str(data)] and len(training["data"]["train_sha256"]) == 64
    assert training["held_out"]["after"]["ce"] < training["held_out"]["before"]["ce"]
    assert json.loads((out / "verify.json").read_text())["passed"]
    assert not [name for name in ran.json["files"] if name.startswith("trained")]
    before, after = tensors(made.source), tensors(out / "trained")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".experts." in name for name in changed)
    again = (out / "engine.json").read_bytes()
    ran = toolchain(*command)
    assert ran.status == 0 and "train: unchanged, skipped" in ran.err and "quantize: unchanged" in ran.err
    assert (out / "engine.json").read_bytes() == again
    assert "CE" in ran.out and "2 steps" in ran.out
    more = toolchain(
        *[3 if word == 2 and command[at - 1] == "--steps" else word for at, word in enumerate(command)]
    )
    assert more.status == 0 and "train: training.steps changed from 2 to 3" in more.err
    assert json.loads((out / "engine.json").read_text())["training"]["steps"] == 3


def test_from_an_engine(toolchain: Run, mine: Made, data: Path, tmp_path: Path) -> None:
    """Model, plan and calibration are the engine's; what training does not change is bit-equal in both checkpoints."""
    ran = toolchain(
        "qat", mine.engine, "--data", data, *FEW, "--device", "cpu", *where(tmp_path), "--seed", 3, "--json"
    )
    assert ran.status == 0, ran.err
    assert "scales are bit-equal" in ran.err
    assert ran.json["training"]["method"] == "qad"
    assert set(ran.json["training"]["held_out"]["before"]) >= {"kl", "top1", "router"}
    plans = [json.loads((root / "plan.json").read_text()) for root in (mine.engine, tmp_path / "out")]
    for key in ("model", "format", "policy", "recipe", "calibration", "assignments", "target", "serving"):
        assert plans[0][key] == plans[1][key], key
    assert plans[1]["training"]["seed"] == 3
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "while training" in page and "<svg" in page.partition("training-kl")[2].partition("</figure>")[0]
    before, after = (tensors(root / "checkpoint") for root in (mine.engine, tmp_path / "out"))
    kept = [name for name in before if name.endswith(("input_scale", "weight_scale_2"))]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_options_win_over_the_engine(toolchain: Run, mine: Made, data: Path, tmp_path: Path) -> None:
    ran = toolchain(
        "qat", mine.engine, "--data", data, *FEW, "--format", "fp8", *where(tmp_path), "--dry-run", "--json"
    )
    assert ran.status == 0, ran.err
    assert "--format fp8 instead of the engine's nvfp4" in ran.err
    assert ran.json["format"] == "fp8" and ran.json["calibration"]["samples"] == 8


def test_another_calibration_is_an_error(toolchain: Run, mine: Made, data: Path, tmp_path: Path) -> None:
    """Scales of the engine's checkpoint that the calibration does not give again: one module is named."""
    (shard,) = (mine.engine / "checkpoint").glob("*.safetensors")
    stored = load_file(shard)
    name = next(name for name in stored if name.endswith("input_scale"))
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    save_file({**stored, name: stored[name] * 1.5}, shard, metadata=metadata)
    ran = toolchain("qat", mine.engine, "--data", data, *FEW, "--device", "cpu", *where(tmp_path), "--json")
    assert ran.status == 1 and ran.json["error"]["code"] == "TC-195"
    assert name in ran.json["error"]["message"]
    assert not (tmp_path / "out" / "trained").exists() and not (tmp_path / "out" / "engine.json").exists()


def without_text(made: Made) -> None:
    made.texts.unlink()


def with_other_text(made: Made) -> None:
    made.texts.write_text(made.texts.read_text() + "more\n")


def with_other_model(made: Made) -> None:
    (shard,) = made.source.glob("*.safetensors")
    stored = load_file(shard)
    name = next(name for name in stored if name.endswith("q_proj.weight"))
    save_file({**stored, name: stored[name] * 2}, shard, metadata={"format": "pt"})


def without_model(made: Made) -> None:
    shutil.rmtree(made.source)


def without_checkpoint(made: Made) -> None:
    shutil.rmtree(made.engine / "checkpoint")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_text, "calibration text"),
        (with_other_text, "changed since"),
        (with_other_model, "changed since"),
        (without_model, "is gone"),
        (without_checkpoint, "no checkpoint"),
    ],
)
def test_engines_that_are_not_what_they_were(
    toolchain: Run, mine: Made, data: Path, tmp_path: Path, change: Callable[[Made], None], says: str
) -> None:
    change(mine)
    ran = toolchain("qat", mine.engine, "--data", data, *FEW, "--device", "cpu", *where(tmp_path), "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-197"
    assert says in ran.json["error"]["message"] and ran.json["error"]["hint"]
    assert not (tmp_path / "out").exists()


def test_an_engine_of_a_recipe_that_cannot_be_trained(
    toolchain: Run, mine: Made, data: Path, tmp_path: Path
) -> None:
    plan = json.loads((mine.engine / "plan.json").read_text())
    (mine.engine / "plan.json").write_text(json.dumps({**plan, "recipe": "four_over_six"}))
    ran = toolchain("qat", mine.engine, "--data", data, *FEW, *where(tmp_path), "--json")
    (problem,) = [item for item in ran.json["error"]["findings"] if item["severity"] == "error"]
    assert ran.status == 2 and problem["code"] == "TC-191"
    assert "toolchain qat" in problem["hint"] and "--recipe max" in problem["hint"]
    works = toolchain(
        "qat", mine.engine, "--recipe", "max", "--data", data, *FEW, *where(tmp_path), "--dry-run", "--json"
    )
    assert works.status == 0 and works.json["recipe"] == "max"


def empty(root: Path) -> tuple[object, ...]:
    (root / "bad.jsonl").write_text("")
    return ("--data", root / "bad.jsonl")


def cut_off(root: Path) -> tuple[object, ...]:
    (root / "bad.jsonl").write_text('{"text": "a"}\n{"te')
    return ("--data", root / "bad.jsonl")


def too_little(root: Path) -> tuple[object, ...]:
    (root / "bad.jsonl").write_text("".join(f'{{"text": "{n} and {n * n}"}}\n' for n in range(99)))
    return ("--data", root / "bad.jsonl", "--batch-size", 64)


def other_ids(root: Path) -> tuple[object, ...]:
    records = ({"input_ids": [n, 999] * 200} for n in range(9))
    (root / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ("--data", root / "bad.jsonl")


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (empty, "TC-520"),
        (lambda root: ("--data", root / "absent.jsonl"), "TC-520"),
        (cut_off, "TC-521"),
        (too_little, "TC-192"),
        (other_ids, "TC-193"),
        (lambda root: ("--held-out", "DATA"), "TC-194"),
        (lambda root: ("--batch-size", 0), "TC-100"),
        (lambda root: ("--train", "router", "--lora"), "TC-100"),
        (lambda root: ("--recipe", "best"), "TC-100"),
        (lambda root: ("--format", "int4_gptq"), "TC-100"),
    ],
)
def test_bad_input(
    toolchain: Run,
    made: Made,
    data: Path,
    tmp_path: Path,
    bad: Callable[[Path], tuple[object, ...]],
    code: str,
) -> None:
    """One clear error, before a weight is loaded; nothing is left behind."""
    options = [data if word == "DATA" else word for word in bad(tmp_path)]
    given = ("--data", data) if "--data" not in options else ()
    before = tree(tmp_path)
    ran = toolchain(
        "qat", made.source, "--format", "nvfp4", *given, *FEW, *options, *calibrated(made), *where(tmp_path),
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert ran.status in (1, 2) and ran.json["error"]["code"] == code, ran.out
    assert "loading" not in ran.err and "Traceback" not in ran.err
    assert tree(tmp_path) == before


def test_adapters_on_attention_and_experts_are_merged_and_run(
    toolchain: Run, mine: Made, data: Path, tmp_path: Path
) -> None:
    """Attention keeps its dtype under the format's default policy, and takes adapters all the same."""
    ran = toolchain(
        "qat", mine.engine, "--data", data, *FEW, "--device", "cpu", *where(tmp_path), "--json", "--lora",
        "--lora-rank", 4, "--learning-rate", 1e-2, "--method", "qat", "--patience", 0, "--train", "attention",
        "--train", "routed_expert",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    out = tmp_path / "out"
    before, after = tensors(mine.source), tensors(out / "trained")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".experts." in name for name in changed) and any(".self_attn." in name for name in changed)
    assert all(".experts." in name or "_proj." in name for name in changed)
    assert json.loads((out / "verify.json").read_text())["passed"]
    told = toolchain("generate", out, "--prompt", "def f(", "--max-tokens", 4, "--json")
    assert told.status == 0, told.err


def losses(engine: Path) -> list[float]:
    lines = (engine / "training" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "step"]


def test_from_a_step_of_a_finished_training(toolchain: Run, mine: Made, data: Path, tmp_path: Path) -> None:
    """The steps behind it are made again, with the same losses; a step without a checkpoint is named."""
    command = (
        "qat", mine.engine, "--data", data, *FEW, "--steps", 4, "--device", "cpu", *where(tmp_path), "--patience", 0,
        "--keep-checkpoints", 9,
    )  # fmt: skip
    assert toolchain(*command).status == 0
    before, first = losses(tmp_path / "out"), tensors(tmp_path / "out" / "trained")
    ran = toolchain(*command, "--from-step", 2, "--json")
    assert ran.status == 0 and "going on from" in ran.err and "checkpoint-2" in ran.err, ran.err
    assert losses(tmp_path / "out") == before and len(before) == 4
    assert all(
        torch.equal(first[name], tensor) for name, tensor in tensors(tmp_path / "out" / "trained").items()
    )
    ran = toolchain(*command, "--from-step", 7, "--json")
    assert (
        ran.status == 1
        and ran.json["error"]["code"] == "TC-256"
        and "no checkpoint of step 7" in ran.json["error"]["message"]
    )
    assert (tmp_path / "out" / "engine.json").is_file()


def test_channels_that_a_recipe_arranged_are_trained_and_audited(
    toolchain: Run, made: Made, data: Path, tmp_path: Path
) -> None:
    """From an engine of recipe arrange: the same order again, and the audit compares with what was trained."""
    engine, common = tmp_path / "engine", ("--device", "cpu", "--json")
    ran = toolchain(
        "engine", made.source, "--format", "nvfp4", "--recipe", "arrange", *calibrated(made), "--output", engine,
        "--triton-output", tmp_path / "t", *common,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    ran = toolchain("qat", engine, "--data", data, *FEW, "--learned-scales", *where(tmp_path), *common)
    assert ran.status == 0 and "scales are bit-equal" in ran.err, ran.err
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["passed"]


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_by_one_command(
    toolchain: Run, mine: Made, data: Path, tmp_path: Path, parallel: str
) -> None:
    command = (
        "qat", mine.engine, "--data", data, *FEW, "--device", "cpu", *where(tmp_path), "--patience", 0,
        "--precision", "fp32", "--learning-rate", 1e-3,
    )  # fmt: skip
    ran = toolchain(*command, "--devices", 2, "--parallel", parallel, "--json")
    assert ran.status == 0 and "2 processes" in ran.err, ran.err
    assert ran.json["training"]["tokens"] == 2 * 2 * 2 * 64
    assert not (tmp_path / "out" / "training" / "processes").exists()
    two = losses(tmp_path / "out")
    one = toolchain(*command, "--batch-size", 4, "--output", tmp_path / "one", "--json")
    assert one.status == 0, one.err
    assert losses(tmp_path / "one") == pytest.approx(two, rel=1e-5)


def test_dry_run_says_what_it_takes(toolchain: Run, made: Made, data: Path, tmp_path: Path) -> None:
    asked = (
        "qat",
        made.source,
        "--format",
        "nvfp4",
        "--data",
        data,
        "--lora",
        *FEW,
        *where(tmp_path),
        "--dry-run",
    )
    ran = toolchain(*asked, "--device", "cpu")
    assert ran.status == 0 and "memory to train" in ran.out and "adapters of rank 16" in ran.out
    told = toolchain(*asked, "--device", "cpu", "--json").json
    figures = told["estimates"]
    assert figures["training_memory_bytes"] == sum(figures["training_memory"].values()) > 0
    assert told["training"]["learning_rate"] == 1e-4 and told["training"]["lora_rank"] == 16
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_planned(toolchain: Run, made: Made, data: Path, tmp_path: Path) -> None:
    huge = ("--batch-size", 4_000_000, "--length", 512)
    ran = toolchain(
        "qat", made.source, "--format", "nvfp4", "--data", data, *FEW, *huge, *where(tmp_path),
        "--device", "cpu", "--json",
    )  # fmt: skip
    (problem,) = [item for item in ran.json["error"]["findings"] if item["severity"] == "error"]
    assert ran.status == 2 and problem["code"] == "TC-190"
    assert "activations" in problem["message"] and "--batch-size 1" in problem["hint"]
    assert not (tmp_path / "out").exists()


def test_a_spec_may_train(toolchain: Run, made: Made, data: Path, tmp_path: Path) -> None:
    spec = tmp_path / "engine.yaml"
    training = {"data": str(data), "method": "qat", "steps": 5, "lora-rank": 4}
    spec.write_text(
        json.dumps({"model": str(made.source), "format": "nvfp4", "device": "cpu", "training": training})
    )
    ran = toolchain("engine", spec, "--output", tmp_path / "out", "--dry-run", "--json")
    assert ran.status == 0, ran.err
    assert ran.json["training"]["method"] == "qat" and ran.json["training"]["lora_rank"] == 4
    spec.write_text(spec.read_text().replace('"steps"', '"stepps"'))
    ran = toolchain("engine", spec, "--dry-run", "--json")
    assert ran.status == 2 and "did you mean steps?" in ran.json["error"]["message"]


def test_streaming_does_not_train(toolchain: Run, made: Made, data: Path, tmp_path: Path) -> None:
    spec = tmp_path / "engine.yaml"
    spec.write_text(
        json.dumps(
            {"model": str(made.source), "format": "nvfp4", "stream": True, "training": {"data": str(data)}}
        )
    )
    ran = toolchain("engine", spec, "--dry-run", "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-191"


def test_an_engine_without_training_has_the_stages_it_had(toolchain: Run, made: Made) -> None:
    """Training being possible runs no stage of an engine again."""
    stamp = (made.engine / "engine.json").stat().st_mtime_ns
    ran = toolchain(*made.command)
    assert ran.status == 0 and ran.err.count("unchanged, skipped") >= 6 and "train" not in ran.err
    assert (made.engine / "engine.json").stat().st_mtime_ns == stamp
    assert not (made.engine / "trained").exists()


@pytest.mark.slow
def test_killed_and_gone_on_with(made: Made, data: Path, tmp_path: Path) -> None:
    """The same command goes on, and the trained weights are those of a run that nobody killed."""

    def command(root: Path) -> list[str]:
        words: tuple[Any, ...] = (
            "qat", made.source, "--format", "nvfp4", "--data", data, *FEW, "--steps", 12, "--learning-rate", 1e-3,
            "--method", "qat", "--patience", 0, *calibrated(made), *where(root), "--device", "cpu",
        )  # fmt: skip
        main = "from toolchain.cli.main import main; main()"
        return [sys.executable, "-c", main, *(str(word) for word in words)]

    first, second = tmp_path / "killed", tmp_path / "whole"
    begun = first / "out" / "training" / "checkpoints" / "checkpoint-2"
    with subprocess.Popen(command(first), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while not begun.is_dir() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (first / "out" / "trained").exists()
    done = subprocess.run(command(first), capture_output=True, text=True)
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr
    assert subprocess.run(command(second), capture_output=True).returncode == 0
    one, other = (tensors(root / "out" / "trained") for root in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
