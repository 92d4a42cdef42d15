"""How a TensorRT engine is served: by NVIDIA's Triton with the TensorRT-LLM backend, one process per rank."""

from __future__ import annotations

import shlex
from pathlib import Path

from toolchain.build.tensorrt import read_lock, require_built
from toolchain.core.errors import ToolchainError
from toolchain.core.images import triton_image
from toolchain.triton.engine_dir import EngineDir

LAUNCHER = "/app/scripts/launch_triton_server.py"
"""In these containers; it starts world_size processes under mpirun."""


def launch_command(engine: EngineDir, repository: Path) -> str:
    """The command for a shell, with the engine's bundle and the repository at the paths that they have here."""
    lock = read_lock(engine.path)
    known = triton_image(str(lock["tensorrt_llm"]))
    # NVIDIA's compatibility matrix names no container for some releases: the tag is left to whoever knows it.
    image = known.pinned if known else f"TRITON_IMAGE_WITH_TENSORRT_LLM_{lock['tensorrt_llm']}"
    mounts = [f"{path}:{path}" for path in (engine.path, repository.absolute())]
    words = ["docker", "run", "--rm", "--gpus", "all", "--ipc=host", "--network=host"]
    for mount in mounts:
        words += ["--volume", mount]
    launch = ["python3", LAUNCHER, "--world_size", str(lock["world_size"])]
    return f"{shlex.join(words)} {image} {shlex.join([*launch, '--model_repo', str(repository.absolute())])}"


def refuse_here(engine: EngineDir, repository: Path) -> None:
    """Always raises. ToolchainError TC-424 when the engine is not built, TC-423 when another release built it, and
    TC-626, with the command, when it could be served, but not by the server that this toolchain starts."""
    lock = read_lock(engine.path)
    require_built(engine.path, lock)
    raise ToolchainError(
        f"engine {engine.name} is for Triton's TensorRT-LLM backend of {lock['tensorrt_llm']}, one process for each of "
        f"its {lock['world_size']} ranks: the server that is started here has none",
        hint=launch_command(engine, repository),
        code="TC-626",
    )
