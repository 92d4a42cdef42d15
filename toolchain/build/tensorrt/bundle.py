"""What target ``tensorrt`` wants beside the checkpoint: rank files, the engine made of them, and their record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from toolchain.build.tensorrt import command
from toolchain.build.tensorrt.checkpoint import write_legacy_checkpoint
from toolchain.build.tensorrt.installed import Installed, find_installed, local_sms
from toolchain.build.tensorrt.lock import (
    LOCK,
    require_built,
    require_same_gpu,
    require_same_release,
    version_lock,
)
from toolchain.build.tensorrt.mapping import Parallel
from toolchain.build.tensorrt.run import TIMEOUT_S, Finished, run_build
from toolchain.core.files import atomic_write_json
from toolchain.core.progress import Progress
from toolchain.plan.types import Plan

RECORD = "trtllm_build.json"
LOG = "trtllm-build.log"
FILES = (command.CHECKPOINT, command.ENGINE, RECORD, LOCK, LOG)
"""Everything that may be written into a bundle."""


def write_tensorrt_files(
    directory: Path,
    plan: Plan,
    *,
    final: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Progress,
) -> list[Path]:
    """Write the rank files of ``directory``/checkpoint and build the engine, where trtllm-build is installed.

    Where it is not, the command that builds it in NVIDIA's container is noted and recorded, and the bundle is complete
    without an engine. ``final``: where the bundle will be, when ``directory`` is its temporary place.

    UsageError TC-423 when the program or the GPUs here are not what the plan is for, before anything is written;
    ToolchainError TC-422 when the build fails: then its log is beside the bundle.
    """
    installed = require_buildable(plan)
    words = command.arguments(plan, directory)
    remove_tensorrt_files(directory)
    parallel = Parallel(tp=plan.serving.tp, pp=plan.serving.pp, ep=plan.serving.ep)
    legacy = write_legacy_checkpoint(
        directory / "checkpoint", directory / command.CHECKPOINT, parallel, force=True, progress=progress
    )
    place = (final or directory).absolute()
    lock = version_lock(plan)
    record = _record(plan, place, installed, legacy.facts())
    if installed is None:
        progress.note(f"there is no {command.PROGRAM} on this machine. The engine is built by:")
        progress.note(record["container_command"])
    else:
        finished = _build(directory, place, [str(installed.program), *words], lock, timeout_s, progress)
        record |= _built(finished)
    atomic_write_json(directory / RECORD, record)
    atomic_write_json(directory / LOCK, lock)
    return [directory / name for name in FILES if (directory / name).exists()]


def require_buildable(plan: Plan) -> Installed | None:
    """The trtllm-build of this machine, None where there is none.

    UsageError TC-423 when it, or the GPUs here, are not what the plan is for.
    """
    installed = find_installed()
    if installed is not None:
        require_same_release(installed, plan)
        require_same_gpu(local_sms(), plan)
    return installed


def remove_tensorrt_files(directory: Path) -> None:
    """What an earlier build left in the bundle (versions.lock.json too, which other targets have as well)."""
    for name in FILES:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _build(
    directory: Path,
    place: Path,
    words: list[str],
    lock: dict[str, Any],
    timeout_s: float,
    progress: Progress,
) -> Finished:
    """The log is written beside the bundle, where a failure leaves it, and moved into it in the end."""
    log_file = place.with_name(f"{place.name}.{LOG}")
    (directory / command.ENGINE).mkdir()
    try:
        finished = run_build(
            words, log_file, ranks=int(lock["world_size"]), timeout_s=timeout_s, progress=progress
        )
        require_built(directory, lock)
    except BaseException:
        shutil.rmtree(directory / command.ENGINE, ignore_errors=True)
        raise
    shutil.move(log_file, directory / LOG)
    return finished


def _record(plan: Plan, place: Path, installed: Installed | None, legacy: dict[str, Any]) -> dict[str, Any]:
    """trtllm_build.json, before the build."""
    return {
        "built": False,
        "tensorrt_llm": plan.target_version,
        "program": str(installed.program) if installed else None,
        "program_version": installed.version if installed else None,
        "command": [command.PROGRAM, *command.arguments(plan, place)],
        "container_command": command.container_command(plan, place),
        "reasons": {choice.flag: choice.reason for choice in command.choices(plan) if choice.reason},
        "checkpoint": legacy,
    }


def _built(finished: Finished) -> dict[str, Any]:
    return {
        "built": True,
        "seconds": finished.seconds,
        "seconds_by_its_clock": finished.log.total or None,
        "warnings": finished.log.warnings,
        "log": LOG,
    }
