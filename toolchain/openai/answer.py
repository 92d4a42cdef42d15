"""One request being answered: as JSON, or as server-sent events while it is generated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.responses import Response

from toolchain.openai.failures import CLIENT_LEFT, ApiError, timed_out, unavailable
from toolchain.openai.merging import merged
from toolchain.openai.metrics import Stopwatch
from toolchain.openai.prompts import Prompt
from toolchain.openai.shapes import Choice, Shape, Usage
from toolchain.openai.texts import Texts, count_tokens
from toolchain.openai.upstream import MARGIN_S, Generation, Upstream
from toolchain.openai.wire import Piece

SEND_GRACE_S = 1.0
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]  # fmt: skip
"""The last one keeps a proxy (nginx) from collecting the events."""
Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]


class Answer(Response):
    """Runs the generations of one request. Until the first piece is there, a failure still has its own HTTP status;
    after it, the failure is an event and the stream ends without ``[DONE]``."""

    def __init__(
        self,
        upstream: Upstream,
        generations: Sequence[Generation],
        *,
        shape: Shape,
        prompts: Sequence[Prompt],
        texts: Texts,
        stopwatch: Stopwatch,
        stream: bool,
        include_usage: bool,
        timeout_s: float,
    ) -> None:
        """``generations``: n for each of ``prompts``, in their order."""
        super().__init__()
        self._upstream = upstream
        self._generations = generations
        self._shape = shape
        self._prompts = prompts
        self._texts = texts
        self._stopwatch = stopwatch
        self._stream = stream
        self._include_usage = include_usage
        self._timeout_s = timeout_s
        self._choices = [Choice() for _ in generations]
        self._left = False
        self._started = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            # Generations end at their deadline by themselves; this ends a reader that does not read.
            async with asyncio.timeout(self._timeout_s + MARGIN_S + SEND_GRACE_S):
                await (self._send_events(send) if self._stream else self._send_whole(scope, receive, send))
        except TimeoutError:
            raise timed_out("the client did not read its answer in time") from None
        except ApiError:
            if not self._left:
                raise
        finally:
            watcher.cancel()
        if self._left:
            scope["toolchain.status"] = CLIENT_LEFT
            self._stopwatch.ended("abandoned")

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left = True
        for generation in self._generations:
            generation.abandon()

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """All pieces, noted in the choices and in the metrics."""
        async with aclosing(merged(self._upstream, self._generations)) as pieces:
            async for index, piece in pieces:
                choice = self._choices[index]
                if self._stream:
                    self._stopwatch.piece(index)
                choice.texts.append(piece.text)
                choice.tokens.extend(piece.logprobs)
                if piece.num_input_tokens is not None:
                    choice.num_input_tokens = piece.num_input_tokens
                if piece.num_output_tokens is not None:
                    choice.num_output_tokens = piece.num_output_tokens
                if piece.finish_reason is not None:
                    choice.finish_reason = _finish_reason(piece.finish_reason)
                    self._stopwatch.ended(choice.finish_reason)
                yield index, piece
        if not self._left and not all(choice.finish_reason for choice in self._choices):
            raise unavailable("the model ended an answer without a finish reason")

    async def _send_whole(self, scope: Any, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass
        if self._left:
            return
        document = self._shape.whole(self._choices, await self._usage())
        body = json.dumps(document, ensure_ascii=False).encode()
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        try:
            async with aclosing(self._pieces()) as pieces:
                async for index, piece in pieces:
                    if self._left:
                        return
                    await self._send_piece(index, piece, send)
            if self._left:
                return
            usage = await self._usage()
            if self._include_usage:
                await self._send_event(self._shape.usage_chunk(usage), send)
            await self._send_event("[DONE]", send)
        except ApiError as error:
            if not self._started or self._left:
                raise
            self._stopwatch.ended("error")
            await self._send_event(json.dumps(error.to_json(), ensure_ascii=False), send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_piece(self, index: int, piece: Piece, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        choice = self._choices[index]
        if len(choice.texts) == 1:
            opening = self._shape.opening(index)
            if opening:
                await self._send_event(opening, send)
        tokens: Sequence[dict[str, Any]] = piece.logprobs
        if piece.text:
            await self._send_event(self._shape.chunk(index, piece.text, tokens, None), send)
            tokens = ()
        if piece.finish_reason is not None:
            await self._send_event(self._shape.chunk(index, "", tokens, choice.finish_reason), send)
        elif tokens:
            await self._send_event(self._shape.chunk(index, "", tokens, None), send)

    async def _send_event(self, data: str, send: Send) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    async def _usage(self) -> Usage:
        """By the model's own counts; where it gives none, by its tokenizer."""
        per_prompt = len(self._choices) // len(self._prompts)
        prompt_tokens = completion_tokens = 0
        for number, prompt in enumerate(self._prompts):
            counted = self._choices[number * per_prompt].num_input_tokens
            prompt_tokens += prompt.tokens if counted is None else counted
        for choice in self._choices:
            counted = choice.num_output_tokens
            if counted is None:
                text = choice.text
                counted = await self._texts.run(len(text), partial(count_tokens, text=text, special=False))
            completion_tokens += counted
        self._stopwatch.usage(prompt_tokens, completion_tokens)
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


def _finish_reason(given: str) -> str:
    """OpenAI's name. Raises ApiError for an answer that the engine broke off."""
    if given == "cancelled":
        raise unavailable("the engine cancelled the answer")
    if given == "timeout":
        raise timed_out("the engine gave the answer up after its own time limit")
    return "length" if given == "length" else "stop"
