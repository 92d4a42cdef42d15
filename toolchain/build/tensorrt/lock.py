"""One release for everything: the plan, the program that builds, the engine that was built, and what serves it.

A TensorRT engine runs on the release that built it and on GPUs of the SM that it was built on, nowhere else
(tensorrtllm_backend issues 190 and 531: "engine version tag mismatch" when the server starts).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.build.tensorrt.command import ENGINE, image
from toolchain.build.tensorrt.installed import Installed
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json
from toolchain.core.gpus import get_gpu
from toolchain.plan.types import Plan
from toolchain.targets.version import parse_version

LOCK = "versions.lock.json"


def version_lock(plan: Plan) -> dict[str, Any]:
    """What must be the same where the engine is built and where it is served."""
    gpu = get_gpu(plan.gpu)
    return {
        "tensorrt_llm": plan.target_version,
        "image": image(plan.target_version),
        "gpu": gpu.name,
        "sm": gpu.sm,
        "world_size": plan.serving.tp * plan.serving.pp,
    }


def require_same_release(installed: Installed, plan: Plan) -> None:
    """UsageError TC-423 when the program here is of another release than the plan's."""
    if installed.version is None or _same(installed.version, plan.target_version):
        return
    raise UsageError(
        f"{installed.program} is of TensorRT-LLM {installed.version}, the plan is for {plan.target_version}",
        hint=f"plan for it (--trtllm-version {installed.version}), or build in {image(plan.target_version)}",
        code="TC-423",
    )


def require_same_gpu(sms: tuple[int, ...], plan: Plan) -> None:
    """UsageError TC-423 when none of this machine's GPUs is of the kind that the plan is for."""
    gpu = get_gpu(plan.gpu)
    if sms and gpu.sm not in sms:
        here = ", ".join(f"SM{sm}" for sm in sorted(set(sms)))
        raise UsageError(
            f"an engine for {gpu.name} (SM{gpu.sm}) is built on such a GPU; this machine has {here}",
            hint="build it there, or choose --gpu as it is here",
            code="TC-423",
        )


def require_built(bundle: Path, lock: dict[str, Any]) -> dict[str, Any]:
    """``engine/config.json`` of a bundle whose engine is complete and of the release and size of ``lock``.

    ToolchainError TC-424 when it is not built yet, TC-423 when it is another one.
    """
    directory = bundle / ENGINE
    path = directory / "config.json"
    missing = [
        name
        for name in ("config.json", *(f"rank{rank}.engine" for rank in range(int(lock["world_size"]))))
        if not (directory / name).is_file()
    ]
    if missing:
        raise ToolchainError(
            f"{directory} lacks {', '.join(missing)}: the TensorRT engine is not built yet",
            hint=f"trtllm-build makes it; {bundle / 'trtllm_build.json'} has the command for {lock['image']}",
            code="TC-424",
        )
    config = read_json(path)
    found = str(config.get("version", ""))
    if not _same(found, str(lock["tensorrt_llm"])):
        raise ToolchainError(
            f"{path} was built by TensorRT-LLM {found or '(unknown)'}, the lock says {lock['tensorrt_llm']}",
            hint=f"build it again with {lock['image']}: engines run on the release that built them only",
            code="TC-423",
        )
    ranks = config.get("pretrained_config", {}).get("mapping", {}).get("world_size")
    if ranks != lock["world_size"]:
        raise ToolchainError(
            f"{path} is for {ranks} ranks, the plan for {lock['world_size']}",
            hint="build it again",
            code="TC-423",
        )
    return config


def read_lock(bundle: Path) -> dict[str, Any]:
    """versions.lock.json of a bundle. ToolchainError TC-424 when there is none."""
    path = bundle / LOCK
    if not path.is_file():
        raise ToolchainError(f"{path} is missing", hint="build the engine again", code="TC-424")
    return read_json(path)


def _same(left: str, right: str) -> bool:
    """Equal releases, however they are spelt; a local version (+cu13) does not count."""
    try:
        return parse_version(left) == parse_version(right)
    except UsageError:
        return False
