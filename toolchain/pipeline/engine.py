"""The whole picture: plan, quantize, verify, evaluate, build, triton; a stage that still holds is skipped."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolchain.auto.outcome import TOLD
from toolchain.core.environment import package_versions
from toolchain.core.errors import FindingsError
from toolchain.core.files import atomic_write_json, read_json, require_free_bytes, sha256_file, sha256_json
from toolchain.core.progress import Progress, Silent
from toolchain.data.texts import read_texts
from toolchain.models.reader import resolve_model
from toolchain.pipeline import auto
from toolchain.pipeline.inputs import (
    CALIBRATION_FILE,
    EVALUATION_FILE,
    model_files,
    text_identity,
    texts_identity,
)
from toolchain.pipeline.request import EngineRequest, find_request_space, make_request_plan
from toolchain.pipeline.settings import build_settings, plan_settings, quantize_settings
from toolchain.pipeline.stages import Stage, exclusive, refuse_foreign, run_stage
from toolchain.plan.planner import require_clean
from toolchain.plan.types import Plan


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    directory: Path
    repository: Path
    plan: Plan
    manifest: dict[str, Any]


def make_engine(
    request: EngineRequest,
    directory: Path,
    repository: Path,
    *,
    command: list[str],
    force: bool = False,
    progress: Progress | None = None,
) -> EngineResult:
    """Make or refresh the engine in ``directory`` and its Triton repository.

    What can be known to be wrong is refused before any work: PlanRefused, and UsageError for outputs that hold
    something else and for held-out text that cannot be read.
    """
    from toolchain.triton.render import refuse_foreign_repository

    progress = progress or Silent()
    plan = require_clean(make_request_plan(request))
    for finding in plan.findings:
        progress.note(str(finding))
    refuse_foreign(directory, force=force)
    refuse_foreign_repository(repository, force=force)
    if request.eval_data:
        next(iter(read_texts(Path(request.eval_data).expanduser())))
    if not (directory / "checkpoint").exists():
        require_free_bytes(directory, plan.estimates.checkpoint_bytes, what="the engine")
    with exclusive(directory):
        return _Run(request, plan, directory, repository, command, force, progress).all()


@dataclass
class _Run:
    request: EngineRequest
    plan: Plan
    directory: Path
    repository: Path
    command: list[str]
    force: bool
    progress: Progress

    def all(self) -> EngineResult:
        searched = self._choose_formats()
        quantized = self._stage("quantize", self._quantize_settings, ("checkpoint",), self._quantize)
        bytes_identity = sha256_json(quantized["outputs"])
        source = {"checkpoint": bytes_identity, "model_identity": self.plan.model_identity}
        stages = {
            **searched,
            "quantize": quantized,
            # Written after the checkpoint: a request that fails there leaves the engine of the last one whole.
            "plan": self._stage("plan", plan_settings(self.plan), ("plan.json",), self._write_plan),
            "verify": self._stage("verify", source, ("verify.json",), self._verify),
            "evaluate": self._stage(
                "evaluate", {**source, **self._data()}, ("metrics.json",), self._evaluate
            ),
            "build": self._stage(
                "build", build_settings(self.plan, bytes_identity), self._target_files(), self._build
            ),
        }
        manifest = self._manifest(stages)
        self._triton()
        return EngineResult(
            directory=self.directory, repository=self.repository, plan=self.plan, manifest=manifest
        )

    def _stage(
        self, name: str, settings: dict[str, Any], outputs: tuple[str, ...], run: Any
    ) -> dict[str, Any]:
        paths = tuple(self.directory / output for output in outputs)
        stage = Stage(name=name, settings=settings, outputs=paths, run=run)
        return run_stage(self.directory, stage, force=self.force, progress=self.progress)

    def _choose_formats(self) -> dict[str, dict[str, Any]]:
        """With ``--format auto``: measure, and go on with the plan that was kept."""
        path = self.directory / auto.FILE
        if not self.request.is_auto:
            path.unlink(missing_ok=True)
            return {}
        space = find_request_space(self.request)
        settings = auto.auto_settings(
            self.request,
            space,
            self.plan,
            model_files=self._model_files,
            calibration_hash=self._calibration_hash,
        )

        def search() -> dict[str, Any]:
            document = auto.run_search(self.request, space, self.progress)
            self._write(auto.FILE, document)
            return {key: document[key] for key in TOLD}

        record = self._stage("auto", settings, (auto.FILE,), search)
        self.plan = auto.outcome(space, path, self.progress)
        return {"auto": record}

    def _unfinish(self) -> None:
        """Called before anything changes that engine.json describes: without it the directory is unfinished."""
        (self.directory / "engine.json").unlink(missing_ok=True)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        self._unfinish()
        atomic_write_json(self.directory / name, value)

    @cached_property
    def _source(self) -> Path:
        return resolve_model(self.plan.model)

    @cached_property
    def _model_files(self) -> dict[str, str]:
        return model_files(self._source, self.directory / "stages" / "inputs" / "model.json")

    @cached_property
    def _calibration_hash(self) -> str | None:
        sources = self.plan.calibration.sources or (str(self._source / CALIBRATION_FILE),)
        return texts_identity([Path(source) for source in sources])

    @property
    def _quantize_settings(self) -> dict[str, Any]:
        return quantize_settings(
            self.plan,
            device=self.request.device,
            model_files=self._model_files,
            calibration_hash=self._calibration_hash,
        )

    def _quantize(self) -> dict[str, Any]:
        from toolchain.quantize.job import quantize

        manifest = quantize(
            self.plan,
            self.directory / "checkpoint",
            device=self.request.device,
            force=True,
            trust_remote_code=self.request.trust_remote_code,
            on_replace=self._unfinish,
            progress=self.progress,
        )
        facts = (
            "calibration",
            "coverage",
            "starved_experts",
            "starved_remedy",
            "tf32",
            "seconds",
            "device",
            "tensor_bytes",
        )
        return {key: manifest[key] for key in facts}

    def _write_plan(self) -> dict[str, Any]:
        self._write("plan.json", self.plan.to_json())
        return {"effective_bits": self.plan.estimates.effective_bits}

    def _verify(self) -> dict[str, Any]:
        from toolchain.checkpoint.audit import audit

        verdict = audit(self.directory / "checkpoint", against=self._source, progress=self.progress)
        self._write("verify.json", verdict.to_json())
        if not verdict.passed:
            raise FindingsError(
                f"the written checkpoint {self.directory / 'checkpoint'} failed its audit",
                verdict.findings,
                hint="nothing is built from it; `toolchain explain CODE` tells more about each finding",
                code="TC-402",
            )
        return verdict.facts

    def _data(self) -> dict[str, Any]:
        data = self._evaluation_data
        return {
            "data": str(data) if data else None,
            "data_file": text_identity(data),
            "tokens": self.request.eval_tokens,
            "device": self.request.device,
        }

    @cached_property
    def _evaluation_data(self) -> Path | None:
        if self.request.eval_data:
            return Path(self.request.eval_data).expanduser().resolve()
        own = self._source / EVALUATION_FILE
        return own if own.is_file() else None

    def _evaluate(self) -> dict[str, Any]:
        data = self._evaluation_data
        if data is None:
            self.progress.note(
                "evaluate: no held-out text (--eval-data): the engine's quality is not measured"
            )
            metrics: dict[str, Any] = {"measured": False}
        else:
            from toolchain.evaluate.checkpoint import evaluate_checkpoint

            metrics = evaluate_checkpoint(
                self.directory / "checkpoint",
                baseline=self._source,
                data=data,
                max_tokens=self.request.eval_tokens,
                device=self.request.device,
                progress=self.progress,
            )
            metrics["measured"] = True
        self._write("metrics.json", metrics)
        return metrics

    def _target_files(self) -> tuple[str, ...]:
        from toolchain.build.bundle import TARGET_FILES

        return TARGET_FILES if self.plan.target == "trtllm" else ()

    def _build(self) -> dict[str, Any]:
        from toolchain.build import write_target_files

        self._unfinish()
        return {"files": [path.name for path in write_target_files(self.directory, self.plan)]}

    def _manifest(self, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """engine.json, rewritten only when it says something else: an unchanged engine stays byte-identical."""
        from toolchain.build import write_manifest

        kept = ("settings", "outputs", "seconds", "peak_memory_bytes", "facts")
        records = {name: {key: record[key] for key in kept} for name, record in stages.items()}
        path = self.directory / "engine.json"
        if path.is_file():
            manifest = read_json(path)
            if isinstance(manifest, dict) and manifest.get("stages") == records:
                return manifest
        return write_manifest(
            self.directory,
            self.plan,
            name=self.directory.resolve().name,
            command=self.command,
            inputs={
                "model": self._model_files,
                "calibration": self._calibration_hash,
                "evaluation": text_identity(self._evaluation_data),
            },
            stages=records,
            metrics=stages["evaluate"]["facts"],
        )

    def _triton(self) -> None:
        from toolchain.triton.render import render_repository

        def render() -> dict[str, Any]:
            render_repository(self.directory, self.repository, force=True)
            return {"repository": str(self.repository)}

        settings = {
            "engine": sha256_file(self.directory / "engine.json"),
            "directory": str(self.directory.resolve()),
            "repository": str(self.repository.resolve()),
            "python": sys.executable,
            "version of toolchain": package_versions().get("toolchain"),
        }
        stage = Stage(name="triton", settings=settings, outputs=(self.repository,), run=render)
        run_stage(self.directory, stage, force=self.force, progress=self.progress)
