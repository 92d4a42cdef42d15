"""A training that was killed goes on with the same loss curve, and only with the settings that it was begun with."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_qat_train import lines_of, losses_of
from tests.training import Notes, training_plan
from toolchain.core.errors import ToolchainError
from toolchain.plan.types import Plan
from toolchain.qat.job import train
from toolchain.qat.session import Session
from toolchain.qat.state import checkpoints

KILLED_AT = 8
"""Optimizer steps after which the process ends; checkpoints are those of 0, 3 and 6."""
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from tests.training import Notes
from toolchain.plan.types import Plan
from toolchain.qat.job import train

class Killer(Notes):
    def track(self, items, *, description, total=None):
        for index, item in enumerate(items):
            if description == "train" and index == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

torch.set_num_threads(1)
plan, root = Plan.from_json(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
train(plan, root / "work", root / "trained", device="cpu", progress=Killer())
"""


@pytest.fixture(scope="module")
def plan(tiny: Callable[[str], Path]) -> Plan:
    """12 steps of 2 x 2 sequences over one and a half epochs: a resumed run must find its place in both."""
    found = training_plan(tiny("qwen3_moe"), steps=12, batch_size=2, accumulate=2)
    assert found.training is not None
    # 12 steps draw 48 sequences at most: the same text twice over comes from fewer held in the data.
    return found


@pytest.fixture(scope="module")
def one_thread() -> Any:
    """Sums of several threads depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(plan: Plan, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training without interruption. Read only."""
    root = tmp_path_factory.mktemp("whole")
    train(plan, root / "work", root / "trained", device="cpu")
    return root


@pytest.fixture(scope="module")
def killed(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training, killed by SIGKILL in a process of its own. Read only: copy it."""
    root = tmp_path_factory.mktemp("killed")
    (root / "plan.json").write_text(json.dumps(plan.to_json()))
    command = [sys.executable, "-c", SCRIPT, root / "plan.json", root, KILLED_AT]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (root / "trained").exists()
    return root


def test_a_killed_training_goes_on_with_the_same_curve(
    plan: Plan, whole: Path, killed: Path, one_thread: None, tmp_path: Path
) -> None:
    """Bit for bit: on one thread of a CPU in float32 nothing is left to chance."""
    shutil.copytree(killed / "work", tmp_path / "work")
    assert lines_of(tmp_path / "work")[-1]["step"] > 6  # what came after the checkpoint is done again
    partial = tmp_path / "work" / "checkpoints" / ".checkpoint-7.partial"
    partial.mkdir()
    (partial / "trained.safetensors").write_bytes(b"half")
    torch.manual_seed(123)  # whatever this process drew before
    notes = Notes()
    train(plan, tmp_path / "work", tmp_path / "trained", device="cpu", progress=notes)
    assert any("checkpoint-6" in line for line in notes.lines)
    steps = [line["step"] for line in lines_of(tmp_path / "work") if line["kind"] == "step"]
    assert steps == list(range(1, 13))
    assert losses_of(tmp_path / "work") == losses_of(whole / "work")
    figures = [
        [
            {name: value for name, value in line.items() if name != "seconds"}
            for line in lines_of(root / "work")
        ]
        for root in (tmp_path, whole)
    ]
    assert figures[0] == figures[1]
    for name in ("model.safetensors", "quantizers.safetensors"):
        assert (tmp_path / "trained" / name).read_bytes() == (whole / "trained" / name).read_bytes()
    assert not partial.exists()


def test_any_checkpoint_that_is_kept_can_be_gone_on_from(
    plan: Plan, whole: Path, killed: Path, one_thread: None, tmp_path: Path
) -> None:
    shutil.copytree(killed / "work", tmp_path / "work")
    train(plan, tmp_path / "work", tmp_path / "trained", device="cpu", from_step=3)
    assert losses_of(tmp_path / "work") == losses_of(whole / "work")
    with pytest.raises(ToolchainError, match="no checkpoint of step 5") as error:
        train(plan, tmp_path / "work", tmp_path / "other", device="cpu", from_step=5)
    assert error.value.code == "TC-256"


def test_an_interrupted_training_says_what_is_kept(plan: Plan, killed: Path, tmp_path: Path) -> None:
    class Interrupting(Notes):
        def track(self, items: Any, *, description: str, total: int | None = None) -> Any:
            for index, item in enumerate(items):
                if description == "train" and index == 2:
                    raise KeyboardInterrupt
                yield item

    shutil.copytree(killed / "work", tmp_path / "work")
    notes = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        train(plan, tmp_path / "work", tmp_path / "trained", device="cpu", progress=notes)
    assert "interrupted; checkpoint-6 is kept" in notes.lines[-1]
    assert not (tmp_path / "trained").exists()
    assert list(Session(directory=tmp_path / "work").checkpoints())[-1] == 6


def test_a_finished_training_is_written_again_without_training(
    plan: Plan, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it was killed while the model was written."""
    shutil.copytree(whole / "work", tmp_path / "work")
    monkeypatch.setattr("toolchain.qat.job.train_rank", lambda *a, **o: pytest.fail("it trains"))
    record = train(plan, tmp_path / "work", tmp_path / "trained", device="cpu")
    assert record["steps"] == 12
    written = (tmp_path / "trained" / "model.safetensors").read_bytes()
    assert written == (whole / "trained" / "model.safetensors").read_bytes()


def test_other_settings_are_named_and_not_begun_anew(plan: Plan, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed / "work", tmp_path / "work")
    before = sorted(path.name for path in (tmp_path / "work" / "checkpoints").iterdir())
    assert plan.training is not None
    other = replace(plan, training=replace(plan.training, learning_rate=2e-4))
    with pytest.raises(
        ToolchainError, match=r"training\.learning_rate changed from 0.0003 to 0.0002"
    ) as error:
        train(other, tmp_path / "work", tmp_path / "trained", device="cpu")
    assert error.value.code == "TC-256"
    text = tmp_path / "more.txt"
    text.write_text(
        "".join(f"Line {i} tells of {i * i} other things, {i % 7} of them blue.\n" for i in range(400))
    )
    other = replace(plan, training=replace(plan.training, data=(str(text),)))
    with pytest.raises(ToolchainError, match=r"training\.data changed .*data\.train_sha256 changed"):
        train(other, tmp_path / "work", tmp_path / "trained", device="cpu")
    assert sorted(path.name for path in (tmp_path / "work" / "checkpoints").iterdir()) == before


def test_checkpoints_are_kept_as_asked_and_the_best_always(plan: Plan, whole: Path) -> None:
    session = Session(directory=whole / "work")
    best = session.state()["best_global_step"]
    assert set(session.checkpoints()) == {9, 12, best}
    assert checkpoints(whole / "work" / "checkpoints") == session.checkpoints()


def test_a_directory_without_trainer_state_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trained.safetensors").write_bytes(b"")
    assert checkpoints(tmp_path) == {}


def test_a_damaged_checkpoint_is_named(plan: Plan, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed / "work", tmp_path / "work")
    file = tmp_path / "work" / "checkpoints" / "checkpoint-6" / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ToolchainError, match=r"checkpoint-6/trained\.safetensors") as error:
        train(plan, tmp_path / "work", tmp_path / "trained", device="cpu")
    assert error.value.code == "TC-256"
