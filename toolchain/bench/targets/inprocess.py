"""The local engine in this process: the runtime without a server and without a protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from toolchain.bench.targets.base import About, Piece, Request, RequestError, TargetSpec
from toolchain.core.errors import ToolchainError


class InProcess:
    def __init__(self, spec: TargetSpec, engine: Any = None) -> None:
        """``engine``: loaded already, with LocalEngine's ``submit``; by default that of ``spec.url``."""
        self._spec = spec
        self._engine = engine
        self._threads: int | None = None
        """CPU threads of this process before it computed as an engine process does."""

    async def prepare(self) -> About:
        import torch

        from toolchain import __version__
        from toolchain.runtime.engine import LocalEngine
        from toolchain.runtime.threads import limit_threads

        if self._engine is None:
            self._engine = LocalEngine.load(self._spec.url)
            self._threads = torch.get_num_threads()
            limit_threads(self._engine.model)
        return About(name="inprocess", version=__version__, model=self._engine.name)

    async def send(self, request: Request) -> AsyncIterator[Piece]:
        from toolchain.runtime.types import SamplingParams

        params = SamplingParams(
            max_tokens=request.max_tokens, seed=self._spec.seed, ignore_eos=self._spec.ignore_eos
        )
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[float, Any]]()

        def take(item: Any) -> None:  # on the model's thread: only the time is taken there
            loop.call_soon_threadsafe(arrived.put_nowait, (time.perf_counter(), item))

        try:
            handle = self._engine.submit(request.prompt, params, take, on_error=take)
        except ToolchainError as error:
            raise RequestError(error.message) from error
        tokens = 0
        try:
            while True:
                received_s, item = await arrived.get()
                if isinstance(item, ToolchainError):
                    raise RequestError(item.message)
                tokens += len(item.token_ids)
                yield Piece(received_s, item.text, item.prompt_tokens, tokens)
                if item.finish_reason is not None:
                    return
        finally:
            handle.cancel()

    async def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)
