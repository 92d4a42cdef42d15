"""One request: the state that the model thread works on, and the handle that its sender holds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.runtime.detokenize import Detokenizer
from toolchain.runtime.sampling import Sampler
from toolchain.runtime.stops import StopFilter
from toolchain.runtime.types import Chunk, Completion, SamplingParams, Times, TokenLogprob

OnChunk = Callable[[Chunk], None]
OnError = Callable[[ToolchainError], None]


class Request:
    """Turns tokens into chunks until the answer ends. Methods are for the model thread."""

    def __init__(
        self,
        *,
        prompt_ids: list[int],
        echo: str,
        params: SamplingParams,
        detokenizer: Detokenizer,
        end_ids: frozenset[int],
        budget: int,
        on_chunk: OnChunk,
        on_error: OnError | None,
        streaming: bool = True,
        timeout_s: float | None = None,
    ) -> None:
        """``echo``: text of the prompt when it belongs to the answer. ``budget``: most tokens to generate.

        Without ``streaming`` the answer is one chunk. ``timeout_s``: time for the whole request, from now on.
        """
        self.prompt_ids = prompt_ids
        self.params = params
        self.sampler = Sampler(params, prompt_ids)
        self.generated: list[int] = []
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self.error: ToolchainError | None = None
        self.last: Chunk | None = None
        self.timeout_s = timeout_s
        self.arrived_s = time.monotonic()
        self._times = Times(arrival_ns=time.time_ns())
        self._first_token_ns = 0
        self._pending: list[int] = []
        self._pending_logprobs: list[TokenLogprob] = []
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._echo = echo
        self._detokenizer = detokenizer
        self._stops = StopFilter(params.stop)
        # Text that nobody sees before the end, and in which nothing is looked for, is decoded once, at the end.
        self._late = not streaming and not params.stop
        self._streaming = streaming
        self._end_ids = frozenset() if params.ignore_eos else end_ids
        self.budget = budget
        self._on_chunk = on_chunk
        self._on_error = on_error

    @property
    def text(self) -> str:
        return "".join(self._text)

    def completion(self) -> Completion:
        """The whole answer, once it has ended without an error."""
        last = self.last or Chunk(text="", finish_reason="")
        return Completion(
            text=self.text,
            token_ids=tuple(self.generated),
            prompt_tokens=len(self.prompt_ids),
            finish_reason=last.finish_reason or "",
            stop_reason=last.stop_reason,
            logprobs=tuple(self._logprobs),
            cumulative_logprob=last.cumulative_logprob,
        )

    @property
    def overdue(self) -> bool:
        """Whether its sender does not wait any longer."""
        return self.timeout_s is not None and time.monotonic() - self.arrived_s > self.timeout_s

    def schedule(self) -> None:
        """It leaves the queue."""
        self._times = replace(self._times, first_scheduled_ns=time.time_ns())

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer and send what text it makes certain."""
        if not self.generated:
            self._first_token_ns = time.time_ns()
        self.generated.append(token_id)
        self._pending.append(token_id)
        if self.sampler.penalties is not None:
            self.sampler.penalties.add(token_id)
        if self.sampler.logprob is not None:
            self._pending_logprobs.append(self.sampler.logprob)
        if token_id in self._end_ids:
            self.finish("stop", stop_reason=token_id)
            return
        text = ""
        if self._late:
            self._detokenizer.extend((token_id,))
        else:
            text = self._stops.push(self._detokenizer.push(token_id))
        if self._stops.matched is not None:
            self._end("stop", text, self._stops.matched)
        elif len(self.generated) >= self.budget:
            self.finish("length", text)
        elif text or self._echo:
            self._pass_on(text)

    def finish(self, reason: str, text: str = "", *, stop_reason: int | None = None) -> None:
        """End the answer with everything that was held back. A stop string in that tail still counts."""
        text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        if self._stops.matched is not None:
            self._end("stop", text, self._stops.matched)
        else:
            self._end(reason, text, stop_reason)

    def fail(self, error: ToolchainError) -> None:
        """End the request without an answer."""
        if self.ended.is_set():
            return
        self.error = error
        self.ended.set()
        if self._on_error is not None:
            try:
                self._on_error(error)
            except Exception as second:  # noqa: BLE001 - a sender's callback must not stop the model thread
                error.add_note(f"its error callback failed as well: {second!r}")

    def _pass_on(self, text: str) -> None:
        if not self._streaming:
            self._text.append(self._echo + text)
            self._echo = ""
            return
        self._send(Chunk(text=self._take_echo(text), **self._take_tokens()))

    def _end(self, reason: str, text: str, stop_reason: str | int | None) -> None:
        now = time.time_ns() if self.generated else 0
        text = self._take_echo(text)
        if not self._streaming:
            text, self._text = "".join([*self._text, text]), []
        chunk = Chunk(
            text=text,
            finish_reason=reason,
            stop_reason=stop_reason,
            times=replace(self._times, first_token_ns=self._first_token_ns, last_token_ns=now),
            **self._take_tokens(),
        )
        if self.params.logprobs is not None:
            total = math.fsum(item.logprob for item in self._logprobs)
            chunk = replace(chunk, cumulative_logprob=total)
        self.last = chunk
        self._send(chunk)
        self.ended.set()

    def _take_echo(self, text: str) -> str:
        text, self._echo = self._echo + text, ""
        return text

    def _take_tokens(self) -> dict[str, Any]:
        """What the next chunk accounts for, as arguments of ``Chunk``."""
        tokens, self._pending = tuple(self._pending), []
        logprobs, self._pending_logprobs = tuple(self._pending_logprobs), []
        self._logprobs += logprobs
        return {"token_ids": tokens, "logprobs": logprobs, "prompt_tokens": len(self.prompt_ids)}

    def _send(self, chunk: Chunk) -> None:
        self._text.append(chunk.text)
        try:
            self._on_chunk(chunk)
        except Exception as error:  # noqa: BLE001 - whatever a sender's callback raises ends this request only
            failure = ToolchainError(f"the receiver of the answer failed: {error!r}", code="TC-508")
            failure.__cause__ = error
            self.fail(failure)


class RequestHandle:
    """What ``LocalEngine.submit`` returns. Safe to use from any thread."""

    def __init__(self, request: Request, wake: Callable[[], Any]) -> None:
        self._request = request
        self._wake = wake

    @property
    def prompt_tokens(self) -> int:
        return len(self._request.prompt_ids)

    @property
    def done(self) -> bool:
        return self._request.ended.is_set()

    def cancel(self) -> None:
        """Ask for an early end: the answer so far is kept, its finish_reason is ``cancelled``."""
        self._request.cancelled.set()
        self._wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the request has ended, with an answer or an error; False when the time is over first."""
        return self._request.ended.wait(timeout_s)

    def result(self, timeout_s: float | None = None) -> Completion:
        """Wait for the whole answer. Raises the error that ended the request, or TimeoutError."""
        if not self._request.ended.wait(timeout_s):
            raise TimeoutError(f"no answer after {timeout_s} s")
        if self._request.error is not None:
            raise self._request.error
        return self._request.completion()
