"""Training over several devices: two processes on this CPU (gloo), against one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.planning import with_calibration
from tests.training import Notes, training_plan
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.plan.types import Plan
from toolchain.qat.job import train
from toolchain.qat.launch import DIRECTORY, launch
from toolchain.qat.messages import Receiver, Sender, read_failure, write_failure

Tiny = Callable[[str], Path]
TOLERANCE = 2e-4
"""Relative, of losses: gradients are summed in another order, and six steps of AdamW follow."""


def losses(work: Path) -> list[float]:
    lines = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


def over(plan: Plan, parallel: str) -> Plan:
    """``plan`` on two devices, with the same global batch."""
    assert plan.training is not None
    half = plan.training.batch_size // 2
    return replace(plan, training=replace(plan.training, devices=2, parallel=parallel, batch_size=half))


def workers(work: Path) -> list[psutil.Process]:
    """Processes of the training in ``work``: the launcher and those that it started."""
    job, found = str(work / DIRECTORY / "job.json"), []
    for process in psutil.process_iter(["cmdline", "status"]):
        if job in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def require_all_gone(work: Path) -> None:
    deadline = time.monotonic() + 60
    while left := workers(work):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def plan(tiny: Tiny) -> Plan:
    return training_plan(
        tiny("qwen3_moe"), lora_rank=4, lora_alpha=8.0, learning_rate=3e-3, router_weight=2.0
    )


@pytest.fixture(scope="module")
def alone(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on one device. Read only."""
    root = tmp_path_factory.mktemp("alone")
    train(plan, root / "work", root / "trained", device="cpu")
    return root


@pytest.mark.parametrize(("parallel", "share"), [("ddp", "100%"), ("fsdp2", "50%")])
def test_two_devices_train_what_one_does(
    plan: Plan, alone: Path, tmp_path: Path, parallel: str, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same global batch in every step; the weights are gathered, and no configuration of the user is looked at."""
    notes, home = Notes(), tmp_path / "home"
    accelerate = home / ".cache" / "huggingface" / "accelerate"
    accelerate.mkdir(parents=True)
    (accelerate / "default_config.yaml").write_text(
        "num_processes: 7\ndistributed_type: NO\nmixed_precision: fp16\n"
    )
    monkeypatch.setenv("HOME", str(home))
    work = tmp_path / "work"
    record = train(over(plan, parallel), work, tmp_path / "trained", device="cpu", progress=notes)
    assert f"2 processes; each holds {share} of the weights" in notes.lines
    assert any(line.startswith("step 6 of 6: loss") for line in notes.lines)
    assert losses(work) == pytest.approx(losses(alone / "work"), rel=TOLERANCE)
    assert record["tokens"] == 6 * 4 * 32
    ours, theirs = (load_file(root / "trained" / "model.safetensors") for root in (tmp_path, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (tensor.float() - theirs[name].float()).norm()
        assert difference <= 0.01 * theirs[name].float().norm(), name
    assert not (work / DIRECTORY).exists() and not workers(work)
    assert [path.name for path in accelerate.iterdir()] == ["default_config.yaml"]


class Interrupting(Notes):
    """Ctrl-C before the fifth step, after the checkpoint of the third."""

    def track(self, items: Any, *, description: str, total: int | None = None) -> Any:
        for index, item in enumerate(items):
            if description == "train" and index == 4:
                raise KeyboardInterrupt
            yield item


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_an_interrupted_training_ends_all_processes_and_goes_on(
    plan: Plan, tmp_path: Path, parallel: str
) -> None:
    """Whole weights, whose moments are gathered and cut again; as one device does it without interruption."""
    several = over(training_plan(Path(plan.model)), parallel)
    work, output = tmp_path / "work", tmp_path / "trained"
    with pytest.raises(KeyboardInterrupt):
        train(several, work, output, device="cpu", progress=Interrupting())
    require_all_gone(work)
    assert {path.name for path in (work / "checkpoints").glob("checkpoint-*")} == {
        "checkpoint-0",
        "checkpoint-3",
    }
    notes = Notes()
    train(several, work, output, device="cpu", progress=notes)
    assert any("going on from" in line for line in notes.lines)
    train(training_plan(Path(plan.model)), tmp_path / "whole", tmp_path / "other", device="cpu")
    assert losses(work) == pytest.approx(losses(tmp_path / "whole"), rel=TOLERANCE)


class Killing(Notes):
    """SIGKILL to the second worker as soon as the first reports anything."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work, self.killed = work, False

    def note(self, text: str) -> None:
        second = [found for found in workers(self.work) if found.environ().get("RANK") == "1"]
        if second and not self.killed:
            second[0].kill()
            self.killed = True


def test_a_process_that_dies_ends_the_others_and_is_named(plan: Plan, alone: Path, tmp_path: Path) -> None:
    work = begun(alone, tmp_path)
    with pytest.raises(ToolchainError, match=r"process 1 of the training ended by SIGKILL") as raised:
        launch(over(plan, "ddp"), work, device="cpu", progress=Killing(work))
    assert raised.value.code == "TC-257"
    require_all_gone(work)


def begun(alone: Path, tmp_path: Path) -> Path:
    """A work directory that is ready to train: its start state, and nothing else."""
    import shutil

    shutil.copytree(alone / "work" / "start", tmp_path / "work" / "start")
    return tmp_path / "work"


@pytest.mark.slow
def test_an_error_of_a_process_is_raised_as_it_was_there(plan: Plan, alone: Path, tmp_path: Path) -> None:
    """A start state of other settings, as ``load_start`` says it in the worker."""
    from toolchain.qat.student import load_start

    other, work = with_calibration(over(plan, "ddp"), samples=9), begun(alone, tmp_path)
    with pytest.raises(ToolchainError) as here:
        load_start(other, work / "start", device="cpu")
    with pytest.raises(ToolchainError) as there:
        launch(other, work, device="cpu")
    assert (there.value.message, there.value.code) == (here.value.message, here.value.code)


PARENT = """
import json, sys
from pathlib import Path
from toolchain.plan.types import Plan
from toolchain.qat.launch import launch
launch(Plan.from_json(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), device="cpu")
"""


@pytest.fixture
def parent(plan: Plan, alone: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that trains on two devices, both workers running."""
    work = begun(alone, tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(over(plan, "ddp").to_json()))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "plan.json"), str(work)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((work / DIRECTORY).glob("stderr-*.log"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    yield process, work
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(
    parent: tuple[subprocess.Popen[bytes], Path], number: signal.Signals
) -> None:
    process, work = parent
    assert len(workers(work)) == 3
    process.send_signal(number)
    assert process.wait(60) != 0
    require_all_gone(work)


def test_another_launchers_processes_must_be_as_many_as_devices(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="WORLD_SIZE is 3") as raised:
        launch(over(plan, "ddp"), tmp_path, device="cpu")
    assert raised.value.code == "TC-259" and not list(tmp_path.iterdir())


EXTERNAL = """
import json, sys
from pathlib import Path
from toolchain.plan.types import Plan
from toolchain.qat.external import follow
if not follow():
    if len(sys.argv) > 2:
        from toolchain.qat.job import train
        root = Path(sys.argv[2])
        train(Plan.from_json(json.loads(Path(sys.argv[1]).read_text())), root / "work", root / "trained", device="cpu")
    print("first")
"""


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_the_processes_of_torchrun_train_together(
    plan: Plan, alone: Path, tmp_path: Path, trains: bool
) -> None:
    """The first runs the whole stage, the second only its part; where nothing is trained it ends as well."""
    (tmp_path / "plan.json").write_text(json.dumps(over(plan, "fsdp2").to_json()))
    (tmp_path / "script.py").write_text(EXTERNAL)
    words = [str(tmp_path / name) for name in ("script.py", "plan.json")] + [str(tmp_path)] * trains
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*torchrun, *words], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("first") == 1
    if trains:
        assert losses(tmp_path / "work") == pytest.approx(losses(alone / "work"), rel=TOLERANCE)
        assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_progress_and_failures_pass_from_process_to_process(tmp_path: Path) -> None:
    stream, notes, drawn = io.StringIO(), Notes(), []

    class Drawing(Notes):
        def track(self, items: Any, *, description: str, total: int | None = None) -> Any:
            drawn.append((description, total))
            for item in items:
                drawn.append(item)
                yield item

    sender = Sender(stream)
    sender.note("loading")
    assert list(sender.track("abc", description="train", total=3)) == ["a", "b", "c"]
    shown = Drawing()
    receiver = Receiver(shown)
    for line in ["a library speaks", *stream.getvalue().splitlines()]:
        receiver.read(line)
    assert shown.lines == ["loading"] and drawn == [("train", 3), 0, 1, 2] and not notes.lines
    write_failure(tmp_path / "failure-1.json", RuntimeError("connection closed by peer"))
    assert read_failure(tmp_path) is None
    write_failure(tmp_path / "failure-0.json", UsageError("what is wrong", hint="do this", code="TC-253"))
    found = read_failure(tmp_path)
    assert isinstance(found, UsageError) and found.to_json() == {
        "code": "TC-253", "message": "what is wrong", "hint": "do this",
    }  # fmt: skip
