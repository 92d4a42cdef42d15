"""One request: the state that the model thread works on, and the handle that its sender holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.runtime.detokenize import Detokenizer
from toolchain.runtime.sampling import Sampler
from toolchain.runtime.stops import StopFilter
from toolchain.runtime.types import Chunk, Completion, SamplingParams

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
    ) -> None:
        """``echo``: text of the prompt when it belongs to the answer. ``budget``: most tokens to generate."""
        self.prompt_ids = prompt_ids
        self.params = params
        self.sampler = Sampler(params)
        self.generated: list[int] = []
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self.error: ToolchainError | None = None
        self.finish_reason = ""
        self._pending: list[int] = []
        self._text: list[str] = []
        self._echo = echo
        self._detokenizer = detokenizer
        self._stops = StopFilter(params.stop)
        self._end_ids = frozenset() if params.ignore_eos else end_ids
        self._budget = budget
        self._on_chunk = on_chunk
        self._on_error = on_error

    @property
    def text(self) -> str:
        return "".join(self._text)

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer and send what text it makes certain."""
        self.generated.append(token_id)
        self._pending.append(token_id)
        if token_id in self._end_ids:
            self.finish("stop")
            return
        text = self._stops.push(self._detokenizer.push(token_id))
        if self._stops.matched:
            self._end("stop", text)
        elif len(self.generated) >= self._budget:
            self.finish("length", text)
        elif text or self._echo:
            self._send(text, None)

    def finish(self, reason: str, text: str = "") -> None:
        """End the answer with everything that was held back. A stop string in that tail still counts."""
        text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self._end("stop" if self._stops.matched else reason, text)

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

    def _end(self, reason: str, text: str) -> None:
        self.finish_reason = reason
        self._send(text, reason)
        self.ended.set()

    def _send(self, text: str, reason: str | None) -> None:
        text, self._echo = self._echo + text, ""
        tokens, self._pending = tuple(self._pending), []
        self._text.append(text)
        chunk = Chunk(text=text, token_ids=tokens, finish_reason=reason, prompt_tokens=len(self.prompt_ids))
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
        return Completion(
            text=self._request.text,
            token_ids=tuple(self._request.generated),
            prompt_tokens=self.prompt_tokens,
            finish_reason=self._request.finish_reason,
        )
