"""The stage that trains, before anything is packed: ``trained/`` of an engine, and ``training/``, where it is made."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.files import atomic_write_json, hash_tree, read_json, sha256_file, sha256_json
from toolchain.models.reader import resolve_model
from toolchain.pipeline.inputs import model_files, texts_identity
from toolchain.pipeline.request import EngineRequest
from toolchain.pipeline.settings import training_settings
from toolchain.pipeline.start import Start, changed_numbers, read_start, require_same_inputs
from toolchain.pipeline.workspace import Workspace
from toolchain.plan.types import Plan
from toolchain.qat.files import SETTINGS, START

TRAINED, WORK = "trained", "training"
STAGE = "train"
CALIBRATED, RESULT, FINISHED = "calibrated", "result", "finished.json"
"""In ``training/``, beside ``toolchain.qat.files``: the student that starts from an engine, what is written before it
is moved, and the hash of what the training was begun with, once its result stands."""
TOLD = (
    "method",
    "teacher",
    "steps",
    "planned_steps",
    "epochs",
    "tokens",
    "stopped",
    "best_step",
    "metric",
    "improved",
    "held_out",
    "loss",
    "data",
    "seconds",
    "peak_memory_bytes",
)
"""What engine.json repeats of training.json."""


def require_trainable(request: EngineRequest, plan: Plan, directory: Path) -> None:
    """Before any work: an engine to start from that is not what it was (TC-197), or that would be replaced (TC-004)."""
    if request.start is None:
        return
    start = read_start(Path(request.start))
    if start.directory == directory.resolve():
        raise UsageError(
            f"--output {directory} is the engine that training starts from",
            hint="choose another",
            code="TC-004",
        )
    if not changed_numbers(start, plan):
        require_same_inputs(start, plan.model_identity, resolve_model(plan.model))


@dataclass
class TrainStage:
    """Trains the plan of ``workspace`` into ``trained/``."""

    workspace: Workspace
    request: EngineRequest
    plan: Plan
    source: Path
    quantize: dict[str, Any]
    """Settings of quantization: what decides the calibration."""

    def record(self) -> dict[str, Any]:
        """Run or skip the stage; its facts are what engine.json says of the training."""
        if self._from_step is not None:  # asked for once: the settings are the same
            (self.workspace.directory / "stages" / f"{STAGE}.json").unlink(missing_ok=True)
        return self.workspace.stage(STAGE, self.settings, (TRAINED,), self._train)

    @cached_property
    def settings(self) -> dict[str, Any]:
        training = self.plan.training
        if training is None:
            raise ValueError("this plan trains nothing")
        texts = {
            "data.files": texts_identity([Path(item) for item in training.data]),
            "held_out.files": texts_identity([Path(item) for item in training.held_out])
            if training.held_out
            else None,
            "teacher.files": _teacher_identity(training.teacher),
        }
        return training_settings(self.plan, self.quantize, texts, self._start_identity)

    @property
    def trained(self) -> Path:
        return self.workspace.directory / TRAINED

    @property
    def _work(self) -> Path:
        return self.workspace.directory / WORK

    @property
    def _from_step(self) -> int | None:
        asked = self.request.training_options()
        return asked.from_step if asked else None

    @cached_property
    def _start(self) -> Start | None:
        """The engine whose calibration is taken; None where the request stores other numbers, or names none."""
        if self.request.start is None:
            return None
        start = read_start(Path(self.request.start))
        changed = changed_numbers(start, self.plan)
        if changed:
            self.workspace.progress.note(
                f"calibrating anew: {', '.join(changed)} are not those of {start.directory}"
            )
        return None if changed else start

    @cached_property
    def _start_identity(self) -> str | None:
        return sha256_json(hash_tree(self._start.checkpoint)) if self._start else None

    def _train(self) -> dict[str, Any]:
        from toolchain.qat.job import train

        result, restart = self._work / RESULT, self._restarts()
        shutil.rmtree(result, ignore_errors=True)  # of a run that was killed between writing and moving it
        record = train(
            self.plan,
            self._work,
            result,
            device=self.request.device,
            start_from=self._calibrated(restart),
            from_step=self._from_step,
            force=restart,
            trust_remote_code=self.request.trust_remote_code,
            progress=self.workspace.progress,
        )
        self.workspace.unfinish()
        self._replace(result)
        atomic_write_json(self._work / FINISHED, {"settings_sha256": sha256_file(self._work / SETTINGS)})
        return {key: record[key] for key in TOLD if key in record}

    def _restarts(self) -> bool:
        """Whether what lies in ``training/`` may be forgotten: it is finished, and another one is asked for.

        One that is not finished is not lost by a changed setting: the training itself refuses that (TC-256).
        """
        if self.workspace.force or self._from_step is not None:
            return self.workspace.force
        path, begun = self._work / FINISHED, self._work / SETTINGS
        if not (path.is_file() and begun.is_file()):
            return False
        finished = read_json(path).get("settings_sha256") == sha256_file(begun)
        return bool(finished) and self._settings_changed()

    def _settings_changed(self) -> bool:
        """Since the record of this stage was written; another version of a package goes on with what is there."""
        path = self.workspace.directory / "stages" / f"{STAGE}.json"
        before = read_json(path).get("settings", {}) if path.is_file() else {}
        names = {name for name in {**before, **self.settings} if not name.startswith("version of")}
        return any(before.get(name) != self.settings.get(name) for name in names)

    def _calibrated(self, restart: bool) -> Path | None:
        """The start state whose scales are those of the engine, made once; None without an engine."""
        path = self._work / CALIBRATED
        if restart:
            shutil.rmtree(path, ignore_errors=True)
        if (
            self._start is None
            or self.plan.training is None
            or ((self._work / START).is_dir() and not restart)
        ):
            return None
        if not path.is_dir():
            from toolchain.qat.data import load_sequences
            from toolchain.qat.start import require_same_scales
            from toolchain.qat.student import make_student, save_start

            progress = self.workspace.progress
            load_sequences(self.plan.training, self.source)  # bad data are refused before a weight is loaded
            student = make_student(
                self.plan,
                device=self.request.device,
                trust_remote_code=self.request.trust_remote_code,
                progress=progress,
            )
            require_same_scales(student, self._start.checkpoint, progress)
            save_start(student, path)
        return path

    def _replace(self, result: Path) -> None:
        """Move what was written to ``trained/``; the old one is removed last, or by the next run."""
        old = self.workspace.directory / f".{TRAINED}.partial"
        shutil.rmtree(old, ignore_errors=True)
        if self.trained.exists():
            self.trained.rename(old)
        result.rename(self.trained)
        shutil.rmtree(old, ignore_errors=True)


def _teacher_identity(teacher: str) -> str | None:
    return sha256_json(model_files(resolve_model(teacher), None)) if teacher else None
