"""The server that `toolchain bench ENGINE` starts for its measurement."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from toolchain.cli.output import Terminal


def start(engine: Path, target: str, stack: contextlib.ExitStack) -> Any:
    """What ``run_bench`` measures: a TritonServer, the address of an OpenAI endpoint over one, or the engine itself.

    What was started ends with ``stack``.
    """
    if target == "inprocess":
        return engine
    server = stack.enter_context(_triton(engine))
    if target != "openai":
        return server
    from toolchain.openai.server import OpenAiServer
    from toolchain.openai.settings import ServedModel
    from toolchain.triton.contract import MODEL_NAME
    from toolchain.triton.engine_dir import read_engine_dir

    models = {MODEL_NAME: ServedModel.of_engine(read_engine_dir(engine))}
    return stack.enter_context(OpenAiServer(grpc_url=server.grpc_url, models=models)).url


def _triton(engine: Path) -> Any:
    from toolchain.triton.engine_dir import read_engine_dir
    from toolchain.triton.freshness import refuse_stale_repository
    from toolchain.triton.inflight_launch import refuse_here
    from toolchain.triton.render import render_repository
    from toolchain.triton.server import TritonServer

    found = read_engine_dir(engine)
    repository = Path("triton_repo") / found.name
    if not repository.is_dir():
        render_repository(engine, repository, allow_unfit=True)  # to measure is not to serve
    refuse_stale_repository(found, repository)
    if found.target == "tensorrt":
        refuse_here(found, repository)
    return TritonServer(repository, progress=Terminal())
