"""An endpoint in front of a scripted Triton, for tests of what it makes of requests and failures."""

from __future__ import annotations

import json
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
WITH_BOS = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }} "
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}<|im_end|>"
    "{% if m.content == 'refuse' %}{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% if enable_thinking is defined and not enable_thinking %} "
    "no thoughts{% endif %} {% endif %}"
)
"""A template that writes BOS, as those of the Llama family do, with tools and a switch, as Qwen's have."""


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


def add_bos(directory: Path) -> Path:
    """Let the tokenizer of ``directory`` put BOS before a text, as those of the Llama family do."""
    file = directory / "tokenizer.json"
    document = json.loads(file.read_text())
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(document))
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
