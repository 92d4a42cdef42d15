"""How a TensorRT engine is served: by NVIDIA's Triton with the TensorRT-LLM backend, one process per rank."""

from __future__ import annotations

import shlex
from pathlib import Path

from toolchain.build.tensorrt import read_lock, require_built
from toolchain.core.errors import ToolchainError
from toolchain.triton.engine_dir import EngineDir

TRITON_IMAGE = "nvcr.io/nvidia/tritonserver"
TAGS = {"1.0.0": "25.10", "1.1.0": "25.12"}
"""Release of TensorRT-LLM -> the container that has it (NVIDIA's Triton compatibility matrix). Of 1.2 none is known
to us."""
LAUNCHER = "/app/scripts/launch_triton_server.py"
"""In these containers; it starts world_size processes under mpirun."""


def launch_command(engine: EngineDir, repository: Path) -> str:
    """The command for a shell, with the engine's bundle and the repository at the paths that they have here."""
    lock = read_lock(engine.path)
    tag = TAGS.get(str(lock["tensorrt_llm"]))
    image = f"{TRITON_IMAGE}:{tag}-trtllm-python-py3" if tag else f"{TRITON_IMAGE}:<tag>-trtllm-python-py3"
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
