"""The whole picture: plan, quantize, verify, evaluate, build, triton; a stage that still holds is skipped."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from toolchain.auto.outcome import TOLD
from toolchain.core.environment import package_versions
from toolchain.core.errors import FindingsError
from toolchain.core.files import read_json, sha256_file, sha256_json
from toolchain.core.progress import Progress, Silent
from toolchain.evaluate import gates
from toolchain.models.reader import resolve_model
from toolchain.pipeline import auto
from toolchain.pipeline.documents import write_documents
from toolchain.pipeline.inputs import CALIBRATION_FILE, model_files, text_identity, texts_identity
from toolchain.pipeline.judging import Judging, require_judgeable
from toolchain.pipeline.packing import require_space, write_checkpoint
from toolchain.pipeline.planning import find_request_space, make_request_plan
from toolchain.pipeline.request import EngineRequest
from toolchain.pipeline.settings import build_settings, plan_settings, quantize_settings
from toolchain.pipeline.stages import exclusive, refuse_foreign
from toolchain.pipeline.training import STAGE, TRAINED, TrainStage, require_trainable
from toolchain.pipeline.training_plan import with_training
from toolchain.pipeline.workspace import Workspace
from toolchain.plan.planner import require_clean
from toolchain.plan.types import Plan

Until = Literal["quantize", "evaluate", "build"]
"""Where an engine may stop: with its checkpoint and plan, measured (and audited before), or complete."""


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    directory: Path
    repository: Path | None
    plan: Plan
    manifest: dict[str, Any]
    """engine.json; empty where it stopped before there is one."""


def make_engine(
    request: EngineRequest,
    directory: Path,
    repository: Path | None,
    *,
    command: list[str],
    until: Until = "build",
    force: bool = False,
    progress: Progress | None = None,
) -> EngineResult:
    """Make or refresh the engine in ``directory`` and its Triton repository; none where that is None.

    ``until`` stops earlier: what is only compared needs no more, and a later call goes on with it. A gate that is not
    passed refuses nothing but the repository.

    What can be known to be wrong is refused before any work: PlanRefused, and UsageError for outputs that hold
    something else, for held-out text that cannot be read and for gates that could not be judged. FindingsError TC-532
    when the finished engine fails a gate: it is marked, and no Triton repository is rendered for it.
    """
    from toolchain.triton.render import refuse_foreign_repository

    progress = progress or Silent()
    plan = require_clean(make_request_plan(request))
    for finding in plan.findings:
        progress.note(str(finding))
    refuse_foreign(directory, force=force)
    if repository is not None:
        refuse_foreign_repository(repository, force=force)
    require_judgeable(request, plan, resolve_model(plan.model))
    require_trainable(request, plan, directory)
    require_space(plan, directory)
    with exclusive(directory):
        workspace = Workspace(directory=directory, force=force, progress=progress)
        return _Run(request, plan, workspace, command).all(repository, until)


@dataclass
class _Run:
    request: EngineRequest
    plan: Plan
    workspace: Workspace
    command: list[str]

    def all(self, repository: Path | None, until: Until) -> EngineResult:
        stages, judging = self._quantized()
        if until == "quantize":
            return EngineResult(directory=self.directory, repository=None, plan=self.plan, manifest={})
        stages |= {"verify": judging.verify(), "evaluate": judging.evaluate()}
        # Before engine.json: an unfit engine is never without its mark.
        judged = judging.gates(stages["evaluate"])
        if until == "evaluate":
            return EngineResult(directory=self.directory, repository=None, plan=self.plan, manifest={})
        settings = build_settings(self.plan, judging.identity["checkpoint"]) | self._builder()
        stages["build"] = self.workspace.stage("build", settings, self._target_files(), self._build)
        manifest = self._manifest(stages, judging.data)
        write_documents(self.workspace)
        if repository is not None:
            self._refuse_unfit(judged, repository)
            self._triton(repository)
        return EngineResult(
            directory=self.directory, repository=repository, plan=self.plan, manifest=manifest
        )

    def _quantized(self) -> tuple[dict[str, dict[str, Any]], Judging]:
        """The stages up to the written checkpoint and its plan, and what judges them."""
        stage = self.workspace.stage
        searched = self._choose_formats()
        trained = self._train()
        settings = self._quantize_settings
        if trained:
            settings["trained"] = sha256_json(trained[STAGE]["outputs"])
        quantized = stage("quantize", settings, ("checkpoint",), self._quantize)
        bytes_identity = sha256_json(quantized["outputs"])
        identity = {"checkpoint": bytes_identity, "model_identity": self.plan.model_identity}
        # The plan is written after the checkpoint: a request that fails there leaves the engine of the last one whole.
        planned = stage("plan", plan_settings(self.plan), ("plan.json",), self._write_plan)
        judging = Judging(self.workspace, self.request, self.plan, self._source, identity)
        if trained:
            judging.trained = self.directory / TRAINED
            judging.trained_identity = settings["trained"]
        return {**searched, **trained, "quantize": quantized, "plan": planned}, judging

    @property
    def directory(self) -> Path:
        return self.workspace.directory

    @property
    def progress(self) -> Progress:
        return self.workspace.progress

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
            self.workspace.write(auto.FILE, document)
            return {key: document[key] for key in TOLD}

        record = self.workspace.stage("auto", settings, (auto.FILE,), search)
        plan = auto.outcome(space, path, self.progress)
        self.plan = require_clean(with_training(self.request, plan, space.info))
        return {"auto": record}

    def _train(self) -> dict[str, dict[str, Any]]:
        """With ``training``: the record of the stage, whose output is packed instead of the source."""
        if self.plan.training is None:
            return {}
        stage = TrainStage(self.workspace, self.request, self.plan, self._source, self._quantize_settings)
        return {STAGE: stage.record()}

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
        return write_checkpoint(self.plan, self.request, self.workspace)

    def _write_plan(self) -> dict[str, Any]:
        self.workspace.write("plan.json", self.plan.to_json())
        return {"effective_bits": self.plan.estimates.effective_bits}

    def _target_files(self) -> tuple[str, ...]:
        from toolchain.build.bundle import TARGET_FILES
        from toolchain.build.local import local_files
        from toolchain.build.tensorrt import FILES

        if self.plan.target == "local":
            return local_files(self.plan, self.directory / "checkpoint")
        return {"trtllm": TARGET_FILES, "tensorrt": FILES}.get(self.plan.target, ())

    def _builder(self) -> dict[str, Any]:
        """What builds it here, where that decides what is written: an engine is made once trtllm-build is there."""
        from toolchain.build.tensorrt.installed import find_installed

        if self.plan.target != "tensorrt":
            return {}
        found = find_installed()
        return {"trtllm-build": (found.version or "unknown") if found else None}

    def _build(self) -> dict[str, Any]:
        from toolchain.build import write_target_files

        self.workspace.unfinish()
        written = write_target_files(self.directory, self.plan, progress=self.progress)
        return {"files": [path.name for path in written]}

    def _manifest(self, stages: dict[str, dict[str, Any]], evaluated_on: Path | None) -> dict[str, Any]:
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
                "evaluation": text_identity(evaluated_on),
            },
            stages=records,
            metrics=stages["evaluate"]["facts"],
            training=stages[STAGE]["facts"] if STAGE in stages else None,
        )

    def _refuse_unfit(self, judged: tuple[gates.Judged, ...], repository: Path) -> None:
        """The engine is complete, for whoever wants to look at it; but there is no repository that would serve it."""
        failed = gates.findings(judged, str(self.directory))
        if failed:
            if repository.exists():  # rendered for bytes that were fit, and would now serve these
                self.progress.note(f"triton: {repository} removed, the engine is not fit to serve")
                shutil.rmtree(repository)
            raise FindingsError(
                f"{self.directory} failed its gates and is marked as not fit to serve",
                failed,
                hint=f"`toolchain triton {self.directory} --allow-unfit` renders its repository all the same",
                code="TC-532",
            )

    def _triton(self, repository: Path) -> None:
        from toolchain.triton.render import render_repository

        def render() -> dict[str, Any]:
            render_repository(self.directory, repository, force=True)
            return {"repository": str(repository)}

        settings = {
            "engine": sha256_file(self.directory / "engine.json"),
            "directory": str(self.directory.resolve()),
            "repository": str(repository.resolve()),
            "python": sys.executable,
            "version of toolchain": package_versions().get("toolchain"),
        }
        self.workspace.stage("triton", settings, (repository.absolute(),), render)
