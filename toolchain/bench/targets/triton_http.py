"""Triton over HTTP: server-sent events of ``generate_stream``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from toolchain.bench.targets.base import (
    About,
    Piece,
    Request,
    RequestError,
    TargetSpec,
    unusable,
)
from toolchain.bench.targets.http import Http, error_message
from toolchain.bench.targets.triton import TritonTarget

REACH_TIMEOUT_S = 10.0


class TritonHttp(TritonTarget):
    def __init__(self, spec: TargetSpec) -> None:
        super().__init__(spec)
        self._http = Http(spec.url)

    async def prepare(self) -> About:
        spec = self.spec
        about = await self._http.get_json("/v2", timeout_s=REACH_TIMEOUT_S)
        metadata = await self._http.get_json(f"/v2/models/{spec.model}", timeout_s=REACH_TIMEOUT_S)
        try:
            names = [tensor["name"] for tensor in metadata["inputs"]]
            name, version = str(about["name"]), str(about["version"])
        except (KeyError, TypeError) as error:
            raise unusable(spec.url, f"/v2 is not Triton's: {error!r} is missing") from error
        await self.settle(names)
        return About(name=name, version=version, model=spec.model, notes=self.inputs.notes(spec))

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent for ``request``, after ``prepare``."""
        return self.inputs.values(request, self.spec)

    async def send(self, request: Request) -> AsyncIterator[Piece]:
        body = json.dumps(self.body(request)).encode()
        async for received_s, data in self._http.events(
            f"/v2/models/{self.spec.model}/generate_stream", body
        ):
            value = json.loads(data)
            if "error" in value:
                raise RequestError(error_message(value))
            text = value.get("text_output", "")
            yield Piece(
                received_s,
                text if isinstance(text, str) else "".join(text),
                value.get("num_input_tokens"),
                value.get("num_output_tokens"),
            )

    async def close(self) -> None:
        await self._http.close()
