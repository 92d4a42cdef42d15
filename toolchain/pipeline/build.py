"""``toolchain build``: an engine of an existing quantized checkpoint, for another target, GPU or limits."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.build import write_manifest, write_target_files
from toolchain.build.llmapi.warmup import require_release, warm_up
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.audit.runtime import runtime_of
from toolchain.checkpoint.audit.subject import read_plan_beside
from toolchain.core.errors import FindingsError, ToolchainError, UsageError
from toolchain.core.files import (
    atomic_directory,
    atomic_write_json,
    hash_tree,
    read_json,
    refuse_occupied,
    refuse_to_replace_source,
)
from toolchain.core.progress import Progress, Silent
from toolchain.evaluate import gates
from toolchain.models.config import read_config
from toolchain.models.reader import read_model
from toolchain.models.types import ModelInfo
from toolchain.pipeline.judging import headline
from toolchain.pipeline.planning import PLACEMENT, with_argument_findings
from toolchain.plan.choices import overrides_of
from toolchain.plan.planner import make_plan, require_clean
from toolchain.plan.types import Plan
from toolchain.runtime.location import locate

NO_WEIGHTS = "TC-144"
"""The finding that a model was planned from its config alone."""
SERVING = ("max_batch_size", "max_seq_len", *PLACEMENT, "llm_args")
"""Wishes of the user that change how the checkpoint is served."""


def build_engine(
    directory: Path,
    output: Path,
    wishes: dict[str, Any],
    *,
    command: list[str],
    dry_run: bool = False,
    warmup: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Audit the checkpoint of ``directory``, re-plan it with ``wishes`` and write the engine to ``output``.

    The checkpoint's files are hard-linked where the file system allows it, copied otherwise. Returns the manifest; a
    dry run returns what it would say, and writes nothing. ``warmup``: the finished engine is loaded, tuned and tried
    (``toolchain.build.llmapi.warmup``), the outcome is the manifest's key of this name.
    """
    progress = progress or Silent()
    checkpoint = locate(directory).checkpoint
    refuse_to_replace_source(output, checkpoint)
    refuse_occupied(output, force=force)
    plan = _replan(directory, checkpoint, wishes)
    if warmup:
        _require_warmable(plan)
    verdict = audit(checkpoint, target=runtime_of(plan), progress=progress)
    if not verdict.passed:
        raise FindingsError(f"{checkpoint} failed its audit", verdict.findings, code="TC-402")
    if dry_run:
        return _preview(plan)
    with atomic_directory(output, force=force) as partial:
        _link_tree(checkpoint, partial / "checkpoint")
        atomic_write_json(partial / "plan.json", plan.to_json())
        atomic_write_json(partial / "verify.json", verdict.to_json())
        metrics = _measured(directory, partial)
        write_target_files(partial, plan, final=output, progress=progress)
        hashes = {path: digest for path, digest in hash_tree(partial).items() if path != gates.FILE}
        manifest = write_manifest(
            partial,
            plan,
            name=output.resolve().name,
            command=command,
            inputs={"checkpoint": {path: hashes[path] for path in hashes if path.startswith("checkpoint/")}},
            stages=_stages(partial, hashes, verdict.facts),
            metrics=metrics,
        )
    return {**manifest, "warmup": warm_up(output, progress=progress)} if warmup else manifest


def _require_warmable(plan: Plan) -> None:
    """UsageError TC-412 for another target, TC-410 for another release than the installed one, before any work."""
    if plan.target != "trtllm":
        raise UsageError(
            f"--warmup: target {plan.target} has nothing to load and tune ahead",
            hint="it is for --target trtllm",
            code="TC-412",
        )
    require_release(plan.target_version)


def _measured(directory: Path, partial: Path) -> dict[str, Any]:
    """What was measured on the same bytes before, and the mark of gates that they failed, taken along."""
    for name in ("metrics.json", gates.FILE):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, partial / name)
    if not (partial / "metrics.json").is_file():
        return {"measured": False}
    return headline(read_json(partial / "metrics.json"))


def _stages(partial: Path, hashes: dict[str, str], audited: dict[str, Any]) -> dict[str, Any]:
    """Stage records as `toolchain engine` has them; what quantization did is told by the checkpoint's own record."""
    record = partial / "checkpoint" / "quantize.json"
    made = read_json(record) if record.is_file() else {}
    facts = (
        "calibration",
        "coverage",
        "seconds",
        "starved_experts",
        "starved_remedy",
        "tf32",
        "device",
        "tensor_bytes",
        "peak_memory_bytes",
        "versions",
    )
    checkpoint = {path: digest for path, digest in hashes.items() if path.startswith("checkpoint/")}
    return {
        "quantize": {"outputs": checkpoint, "facts": {key: made.get(key) for key in facts}},
        "verify": {"outputs": {"verify.json": hashes["verify.json"]}, "facts": audited},
        "build": {"outputs": {path: hashes[path] for path in hashes if path not in checkpoint}},
    }


def _replan(directory: Path, checkpoint: Path, wishes: dict[str, Any]) -> Plan:
    """The plan that made the checkpoint, with what the user wants changed. The weights' part of it stays as it is."""
    made = read_plan_beside(directory) or read_plan_beside(checkpoint)
    if made is None:
        raise UsageError(
            f"{checkpoint} has no plan.json: it is not known what it was planned for",
            hint="quantize with `toolchain quantize`, which writes one",
            code="TC-401",
        )
    serving = replace(made.serving, **{key: wishes[key] for key in SERVING if key in wishes})
    info = _source(made.model, checkpoint)
    planned = with_argument_findings(
        make_plan(
            info,
            format=made.format,
            policy=made.policy,
            policy_options=made.policy_options,
            # The bytes are there: who gets what is no question any more, whatever another target would have changed.
            overrides=overrides_of(made),
            recipe=made.recipe,
            kv_cache=made.kv_cache,
            gpu=wishes.get("gpu", made.gpu),
            target=wishes.get("target", made.target),
            target_version=wishes.get("trtllm_version"),
            serving=serving,
            calibration=made.calibration,
        )
    )
    if info.source != made.model:
        return require_clean(_as_made(planned, made))
    if planned.model_identity != made.model_identity:
        raise UsageError(
            f"{made.model} is no longer the model that {checkpoint} was made of (its config or headers changed)",
            hint="quantize it again",
            code="TC-401",
        )
    return require_clean(planned)


def _source(model: str, checkpoint: Path) -> ModelInfo:
    """What the checkpoint was made of; where that is not at hand, what its config.json describes.

    People quantize and serve in different containers.
    """
    try:
        return read_model(model)
    except ToolchainError:
        if Path(model).is_dir():
            raise
    config = {key: value for key, value in read_config(checkpoint).items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as directory:
        atomic_write_json(Path(directory) / "config.json", config)
        return read_model(directory)


def _as_made(planned: Plan, made: Plan) -> Plan:
    """``planned`` from the config alone, with what is known of the weights from when the checkpoint was made."""
    findings = tuple(finding for finding in planned.findings if finding.code != NO_WEIGHTS)
    return replace(
        planned,
        model=made.model,
        model_identity=made.model_identity,
        assignments=made.assignments,
        findings=findings,
    )


def _preview(plan: Plan) -> dict[str, Any]:
    return {
        "target": plan.target,
        "target_version": plan.target_version,
        "gpu": plan.gpu,
        "limits": {"max_batch_size": plan.serving.max_batch_size, "max_seq_len": plan.serving.max_seq_len},
        "parallel": {"tp": plan.serving.tp, "ep": plan.serving.ep, "pp": plan.serving.pp},
        "dry_run": True,
    }


def _link_tree(source: Path, target: Path) -> None:
    """Shards are linked: they are large, and nothing writes them in place. The rest is copied: people edit it."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            with contextlib.suppress(OSError):
                os.link(path.resolve(), target / path.name)
                continue
        shutil.copyfile(path, target / path.name)
