"""An endpoint in front of a scripted Triton, for tests of what it makes of requests and failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from tests.grpc_triton import GrpcTriton, Script
from tests.tiny import write_tokenizer
from toolchain.openai.server import OpenAiServer
from toolchain.openai.settings import Bounds, ServedModel

MAX_SEQ_LEN = 512
TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Running:
    server: OpenAiServer
    triton: GrpcTriton

    @property
    def script(self) -> Script:
        return self.triton.script

    @property
    def url(self) -> str:
        return self.server.url

    def client(self, **options: Any) -> OpenAI:
        settings = {"api_key": "unused", "max_retries": 0, "timeout": TIMEOUT_S, **options}
        return OpenAI(base_url=f"{self.url}/v1", **settings)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=TIMEOUT_S, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=TIMEOUT_S, **options)


def write_model(directory: Path) -> Path:
    """What the endpoint needs of a checkpoint: a tokenizer beside a config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    (directory / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return directory


@contextmanager
def endpoint(tokenizer: Path, *, chat_template: Path | None = None, **options: Any) -> Iterator[Running]:
    """``options``: of OpenAiServer; fields of Bounds go into its bounds."""
    bounds = {name: options.pop(name) for name in list(options) if name in Bounds.__dataclass_fields__}
    served = ServedModel(
        tokenizer=tokenizer, max_seq_len=MAX_SEQ_LEN, aliases=("tiny",), chat_template=chat_template
    )
    with GrpcTriton() as triton:
        settings = {"models": {"tensorrt_llm": served}, "bounds": Bounds(**bounds), **options}
        with OpenAiServer(grpc_url=triton.url, **settings) as server:
            yield Running(server=server, triton=triton)
