"""``toolchain build``: an engine of an existing quantized checkpoint, for another target, GPU or limits."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.build import write_manifest, write_target_files
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.audit.subject import read_plan_beside
from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.files import atomic_directory, atomic_write_json, hash_tree, read_json
from toolchain.core.progress import Progress, Silent
from toolchain.models.reader import read_model
from toolchain.plan.planner import make_plan, require_clean
from toolchain.plan.types import Plan
from toolchain.runtime.location import locate

SERVING = ("tp", "ep", "pp", "max_batch_size", "max_seq_len")


def build_engine(
    directory: Path,
    output: Path,
    wishes: dict[str, Any],
    *,
    command: list[str],
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Audit the checkpoint of ``directory``, re-plan it with ``wishes`` and write the engine to ``output``.

    The checkpoint's files are hard-linked where the file system allows it, copied otherwise. Returns the manifest; a
    dry run returns what it would say, and writes nothing.
    """
    progress = progress or Silent()
    checkpoint = locate(directory).checkpoint
    plan = _replan(checkpoint, wishes)
    verdict = audit(checkpoint, progress=progress)
    if not verdict.passed:
        raise FindingsError(f"{checkpoint} failed its audit", verdict.findings, code="TC-402")
    if dry_run:
        return _preview(plan)
    metrics = directory / "metrics.json"
    with atomic_directory(output, force=force) as partial:
        _link_tree(checkpoint, partial / "checkpoint")
        atomic_write_json(partial / "plan.json", plan.to_json())
        atomic_write_json(partial / "verify.json", verdict.to_json())
        if metrics.is_file():
            shutil.copyfile(metrics, partial / "metrics.json")
        write_target_files(partial, plan)
        stages = {
            "quantize": {"outputs": hash_tree(partial / "checkpoint"), "facts": {"starved_experts": []}},
            "verify": {"facts": verdict.facts},
        }
        return write_manifest(
            partial,
            plan,
            name=output.name,
            command=command,
            stages=stages,
            metrics=read_json(metrics) if metrics.is_file() else {"measured": False},
        )


def _replan(checkpoint: Path, wishes: dict[str, Any]) -> Plan:
    """The plan that made the checkpoint, with what the user wants changed. The weights' part of it stays as it is."""
    made = read_plan_beside(checkpoint)
    if made is None:
        raise UsageError(
            f"{checkpoint} has no plan.json: it is not known what it was planned for",
            hint="quantize with `toolchain quantize`, which writes one",
            code="TC-401",
        )
    serving = replace(made.serving, **{key: wishes[key] for key in SERVING if key in wishes})
    planned = make_plan(
        read_model(made.model),
        format=made.format,
        policy=made.policy,
        kv_cache=made.kv_cache,
        gpu=wishes.get("gpu", made.gpu),
        target=wishes.get("target", made.target),
        target_version=wishes.get("trtllm_version"),
        serving=serving,
        calibration=made.calibration,
    )
    if planned.model_identity != made.model_identity:
        raise UsageError(
            f"{made.model} is no longer the model that {checkpoint} was made of (its config or headers changed)",
            hint="quantize it again",
            code="TC-401",
        )
    return require_clean(planned)


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
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            try:
                os.link(path, target / path.name)
            except OSError:
                shutil.copyfile(path, target / path.name)
