"""The whole picture: plan, quantize, verify, evaluate, build, triton; a stage that still holds is skipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.core.environment import package_versions
from toolchain.core.errors import FindingsError
from toolchain.core.files import atomic_write_json, read_json, require_free_bytes, sha256_json
from toolchain.core.progress import Progress, Silent
from toolchain.pipeline.request import EngineRequest, make_request_plan
from toolchain.pipeline.stages import Stage, exclusive, run_stage
from toolchain.plan.planner import require_clean
from toolchain.plan.types import Plan

NUMERIC_PACKAGES = ("torch", "transformers", "nvidia-modelopt", "toolchain")
"""A change of version of these may change bytes: the stages that they decide run again."""
EVALUATION_FILE = "evaluation.jsonl"
"""A model directory may carry held-out text of its own under this name."""


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
    """Make or refresh the engine in ``directory`` and its Triton repository. Raises PlanRefused before any work."""
    progress = progress or Silent()
    plan = require_clean(make_request_plan(request))
    for finding in plan.findings:
        progress.note(str(finding))
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
        atomic_write_json(self.directory / "plan.json", self.plan.to_json())
        quantized = self._stage("quantize", self._quantize_settings(), ("checkpoint",), self._quantize)
        bytes_identity = sha256_json(quantized["outputs"])
        source = {"checkpoint": bytes_identity, "model_identity": self.plan.model_identity}
        stages = {
            "quantize": quantized,
            "verify": self._stage("verify", source, ("verify.json",), self._verify),
            "evaluate": self._stage(
                "evaluate", {**source, **self._data()}, ("metrics.json",), self._evaluate
            ),
            "build": self._stage(
                "build", self._build_settings(bytes_identity), self._target_files(), self._build
            ),
        }
        manifest = self._manifest(stages)
        self._triton(manifest)
        return EngineResult(
            directory=self.directory, repository=self.repository, plan=self.plan, manifest=manifest
        )

    def _stage(
        self, name: str, settings: dict[str, Any], outputs: tuple[str, ...], run: Any
    ) -> dict[str, Any]:
        paths = tuple(self.directory / output for output in outputs)
        stage = Stage(name=name, settings=settings, outputs=paths, run=run)
        return run_stage(self.directory, stage, force=self.force, progress=self.progress)

    def _quantize_settings(self) -> dict[str, Any]:
        versions = package_versions()
        plan = self.plan
        return {
            "model_identity": plan.model_identity,
            "model": plan.model,
            "format": plan.format,
            "policy": plan.policy,
            "kv_cache": plan.kv_cache,
            **{f"calibration.{key}": value for key, value in asdict(plan.calibration).items()},
            "calibration.file": _file_identity(plan.calibration.data, plan.model),
            "device": self.request.device,
            **{f"version of {name}": versions.get(name) for name in NUMERIC_PACKAGES},
        }

    def _quantize(self) -> dict[str, Any]:
        from toolchain.quantize.job import quantize

        manifest = quantize(
            self.plan,
            self.directory / "checkpoint",
            device=self.request.device,
            force=True,
            trust_remote_code=self.request.trust_remote_code,
            progress=self.progress,
        )
        return {
            key: manifest[key]
            for key in ("calibration", "seconds", "starved_experts", "device", "tensor_bytes")
        }

    def _verify(self) -> dict[str, Any]:
        from toolchain.checkpoint.audit import audit
        from toolchain.models.reader import resolve_model

        verdict = audit(
            self.directory / "checkpoint", against=resolve_model(self.plan.model), progress=self.progress
        )
        atomic_write_json(self.directory / "verify.json", verdict.to_json())
        if not verdict.passed:
            raise FindingsError(
                f"the written checkpoint {self.directory / 'checkpoint'} failed its audit",
                verdict.findings,
                hint="nothing is built from it; `toolchain explain CODE` tells more about each finding",
                code="TC-402",
            )
        return verdict.facts

    def _data(self) -> dict[str, Any]:
        data = self._evaluation_data()
        return {
            "data": str(data) if data else None,
            "data_file": _file_identity(str(data), "") if data else None,
            "tokens": self.request.eval_tokens,
        }

    def _evaluation_data(self) -> Path | None:
        if self.request.eval_data:
            return Path(self.request.eval_data)
        own = Path(self.plan.model) / EVALUATION_FILE
        return own if own.is_file() else None

    def _evaluate(self) -> dict[str, Any]:
        data = self._evaluation_data()
        if data is None:
            self.progress.note(
                "evaluate: no held-out text (--eval-data): the engine's quality is not measured"
            )
            metrics: dict[str, Any] = {"measured": False}
        else:
            from toolchain.evaluate.checkpoint import evaluate_checkpoint
            from toolchain.models.reader import resolve_model

            metrics = evaluate_checkpoint(
                self.directory / "checkpoint",
                baseline=resolve_model(self.plan.model),
                data=data,
                max_tokens=self.request.eval_tokens,
                device=self.request.device,
                progress=self.progress,
            )
            metrics["measured"] = True
        atomic_write_json(self.directory / "metrics.json", metrics)
        return metrics

    def _build_settings(self, bytes_identity: str) -> dict[str, Any]:
        plan = self.plan
        return {
            "checkpoint": bytes_identity,
            "target": plan.target,
            "target_version": plan.target_version,
            "gpu": plan.gpu,
            **{f"serving.{key}": value for key, value in asdict(plan.serving).items()},
        }

    def _target_files(self) -> tuple[str, ...]:
        from toolchain.build.bundle import TARGET_FILES

        return TARGET_FILES if self.plan.target == "trtllm" else ()

    def _build(self) -> dict[str, Any]:
        from toolchain.build import write_target_files

        return {"files": [path.name for path in write_target_files(self.directory, self.plan)]}

    def _manifest(self, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """engine.json, rewritten only when a stage ran or it is missing: an unchanged engine stays byte-identical."""
        from toolchain.build import write_manifest

        path = self.directory / "engine.json"
        if path.is_file() and all(record["skipped"] for record in stages.values()):
            return dict(read_json(path))
        kept = ("settings", "outputs", "seconds", "peak_memory_bytes", "facts")
        return write_manifest(
            self.directory,
            self.plan,
            name=self.directory.name,
            command=self.command,
            stages={name: {key: record[key] for key in kept} for name, record in stages.items()},
            metrics=stages["evaluate"]["facts"],
        )

    def _triton(self, manifest: dict[str, Any]) -> None:
        from toolchain.triton.render import render_repository

        self.progress.note(f"triton: rendering {self.repository}")
        render_repository(self.directory, self.repository, force=True)


def _file_identity(data: str, model: str) -> str | None:
    """Hash of the calibration file(s), so that edited text is noticed; None for a hub data set."""
    from toolchain.core.files import hash_tree, sha256_file

    path = Path(data) if data else Path(model) / "calibration.jsonl"
    if path.is_file():
        return sha256_file(path)
    return sha256_json(hash_tree(path)) if path.is_dir() else None
