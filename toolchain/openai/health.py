"""Whether the models answer: by an inference, since Triton calls a dead model ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import aclosing

from toolchain.openai.failures import ApiError
from toolchain.openai.upstream import Upstream

REMEMBERED_S = 1.0
"""However many ask, a model gets one probe in this time."""
_PROBE = {"text_input": "probe", "streaming": True, "sampling_param_max_tokens": 1}


class Readiness:
    def __init__(self, upstream: Upstream, models: Iterable[str], *, timeout_s: float) -> None:
        self._upstream = upstream
        self._models = tuple(models)
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._checked = float("-inf")
        self._found: dict[str, str] = {}

    async def check(self) -> dict[str, str]:
        """Model -> what is wrong with it; empty means that it answers. At most REMEMBERED_S old."""
        async with self._lock:
            if time.monotonic() - self._checked > REMEMBERED_S:
                told = await asyncio.gather(*(self._probe(model) for model in self._models))
                self._found = dict(zip(self._models, told, strict=True))
                self._checked = time.monotonic()
            return self._found

    async def _probe(self, model: str) -> str:
        """Empty where ``model`` answers, be it this probe or others: in a long queue the probe alone would fail."""
        started = time.monotonic()
        if self._upstream.heard.get(model, float("-inf")) > started - REMEMBERED_S:
            return ""
        generation = self._upstream.open(model, _PROBE, timeout_s=self._timeout_s)
        try:
            async with aclosing(generation.pieces()) as pieces:
                async for _ in pieces:
                    pass
        except ApiError as error:
            # A full queue is a model that works.
            heard = self._upstream.heard.get(model, float("-inf")) > started
            return "" if heard or error.status == 429 else error.message
        return ""
