"""Servers with OpenAI's API: trtllm-serve, NIM, vLLM, and ``toolchain serve --openai``."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

from toolchain.bench.targets.base import (
    About,
    Piece,
    Request,
    RequestError,
    TargetSpec,
    ask_once,
    unusable,
)
from toolchain.bench.targets.http import Http, error_message

REACH_TIMEOUT_S = 10.0
KEY_VARIABLES = ("TOOLCHAIN_API_KEY", "OPENAI_API_KEY")
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
FULL_LENGTH: tuple[tuple[str, ...], ...] = (("ignore_eos", "min_tokens"), ("ignore_eos",), ("nvext",), ())
"""Extensions that make answers as long as asked for, tried in this order: vLLM and trtllm-serve have the first,
NVIDIA's Dynamo and some NIM the ``nvext`` object; OpenAI itself has none."""


class OpenAi:
    def __init__(self, spec: TargetSpec) -> None:
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")
        self._spec = spec
        self._http = Http(
            spec.url.rstrip("/").removesuffix("/v1"), {"Authorization": f"Bearer {key}"} if key else {}
        )
        self._model = spec.model
        self._extensions: tuple[str, ...] = FULL_LENGTH[0] if spec.ignore_eos else ()
        self._usage = True
        self._seed = True

    async def prepare(self) -> About:
        listed = await self._http.get_json("/v1/models", timeout_s=REACH_TIMEOUT_S)
        try:
            models = [item["id"] for item in listed["data"]]
            owner = str(listed["data"][0].get("owned_by") or "unknown") if models else ""
        except (KeyError, TypeError) as error:
            raise unusable(self._spec.url, f"/v1/models is not OpenAI's: {error!r} is missing") from error
        if not models or (self._model and self._model not in models):
            wanted = f"no model {self._model!r}" if self._model else "no model at all"
            raise unusable(self._spec.url, f"the server has {wanted}, but {models}", "give --model")
        self._model = self._model or models[0]
        notes = await self._find_what_it_takes()
        return About(name=f"openai ({owner})", version="", model=self._model, notes=notes)

    async def _find_what_it_takes(self) -> tuple[str, ...]:
        """Ask with everything, and with less after each refusal. Returns what had to be left out, in words."""
        attempts = [
            (usage, extensions) for usage in (True, False) for extensions in self._wanted_extensions()
        ]
        refused: RequestError | None = None
        for self._seed in (True, False):
            for self._usage, self._extensions in attempts:
                try:
                    await ask_once(self, self._spec.url)
                except RequestError as error:
                    if not str(error).startswith(("HTTP 400", "HTTP 422")):
                        raise unusable(self._spec.url, str(error)) from error
                    refused = refused or error
                else:
                    return tuple(self._left_out())
        raise unusable(self._spec.url, str(refused)) from refused

    def _wanted_extensions(self) -> tuple[tuple[str, ...], ...]:
        return FULL_LENGTH if self._spec.ignore_eos else ((),)

    def _left_out(self) -> list[str]:
        found = []
        if self._spec.ignore_eos and not self._extensions:
            found.append("the server refuses ignore_eos: answers may be shorter than asked for")
        if not self._usage:
            found.append("the server refuses stream_options: tokens are counted with the tokenizer")
        return found

    async def send(self, request: Request) -> AsyncIterator[Piece]:
        body = json.dumps(self.body(request)).encode()
        finished = False
        async for received_s, data in self._http.events(PATHS[self._spec.endpoint], body):
            if data == b"[DONE]":
                finished = True
                continue
            value = json.loads(data)
            if value.get("error"):
                raise RequestError(error_message(value))
            choices, usage = value.get("choices") or (), value.get("usage") or {}
            finished = finished or any(choice.get("finish_reason") for choice in choices)
            yield Piece(
                received_s,
                "".join(_text(choice) for choice in choices),
                usage.get("prompt_tokens"),
                usage.get("completion_tokens"),
            )
        if not finished:
            raise RequestError("the stream ended before the answer did")

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent for ``request``, after ``prepare``."""
        extras: dict[str, Any] = {
            "ignore_eos": True,
            "min_tokens": request.max_tokens,
            "nvext": {"ignore_eos": True},
        }
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "stream": True,
            "temperature": 0,
        }
        if self._spec.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if self._seed:
            body["seed"] = self._spec.seed
        return {**body, **(USAGE if self._usage else {}), **{name: extras[name] for name in self._extensions}}

    async def close(self) -> None:
        await self._http.close()


def _text(choice: dict[str, Any]) -> str:
    """Text of one choice of a chunk. Reasoning is generated like the rest, so it counts."""
    if "delta" in choice:
        delta = choice["delta"] or {}
        return f"{delta.get('reasoning_content') or delta.get('reasoning') or ''}{delta.get('content') or ''}"
    return choice.get("text") or ""
