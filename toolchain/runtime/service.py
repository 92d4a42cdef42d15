"""Messages of one parent to one engine, and the engine's answers back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.runtime.encode import LONG_BYTES
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.protocol import (
    NO_REQUEST,
    Generate,
    chunk_fields,
    error_message,
    parse_generate,
    parse_line,
    request_id,
)
from toolchain.runtime.request import RequestHandle
from toolchain.runtime.token_text import TokenText
from toolchain.runtime.types import Chunk


class Writer:
    """Writes messages from several threads, one whole line each."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self.broken = False
        """True once the reader is gone; later messages are dropped."""

    def send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, ensure_ascii=True).encode("ascii") + b"\n"
        with self._lock:
            if self.broken:
                return
            try:
                self._stream.write(line)
                self._stream.flush()
            except OSError:  # the parent has gone
                self.broken = True


class Service:
    """Feeds requests of one parent to one engine.

    What the engine says in one round (a chunk for every running request, as a rule) is one message: a line, a write
    and a wake-up of the parent for each token of each request would cost more than a small model's step.
    """

    def __init__(self, engine: LocalEngine, writer: Writer) -> None:
        self._engine = engine
        self._writer = writer
        self._tokens = TokenText(engine.tokenizer)
        self._running: dict[int, RequestHandle | None] = {}
        """Requests by id; None between the moment an id is taken and its submission."""
        self._cancelled: set[int] = set()
        """Those of the latter that are not wanted any more."""
        self._lock = threading.Lock()
        self._round: list[dict[str, Any]] = []
        """Chunks and errors that the next flush sends. The model thread's own."""
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="long-prompts")
        engine.on_flush(self._flush)

    def serve(self, lines: Iterable[bytes]) -> None:
        """Handle messages until ``shutdown`` or the end of ``lines``."""
        limits = self._engine.limits
        self._writer.send(
            {
                "op": "ready",
                "model": self._engine.name,
                "max_batch_size": limits.max_batch_size,
                "max_seq_len": limits.max_seq_len,
                "max_prompt_bytes": self._engine.encoder.max_bytes,
            }
        )
        for line in lines:
            if line.strip() and not self._handle(line):
                break
        self._reader.shutdown(cancel_futures=True)
        self._cancel_all()

    def _handle(self, line: bytes) -> bool:
        """One message; False for ``shutdown``. No message, however odd, ends the process."""
        identity = NO_REQUEST
        try:
            message = parse_line(line)
            if message["op"] == "shutdown":
                return False
            if message["op"] not in ("generate", "cancel"):
                identity = message["id"] if type(message.get("id")) is int else NO_REQUEST
                raise UsageError(
                    f"unknown op {message['op']!r} (known: generate, cancel, shutdown)", code="TC-511"
                )
            identity = request_id(message)
            if message["op"] == "generate":
                self._generate(identity, parse_generate(message))
            else:
                self._cancel(identity)
        except Exception as error:  # noqa: BLE001 - one message must not end the service of all others
            self._refuse(identity, error)
        return True

    def _generate(self, identity: int, message: Generate) -> None:
        with self._lock:
            if identity in self._running:
                raise UsageError(f"id {identity} belongs to a request that still runs", code="TC-511")
            self._running[identity] = None
        if LONG_BYTES < len(message.text_input) <= self._engine.encoder.max_bytes:
            # Tokenizing it takes so long that the messages of others must not wait for it.
            self._reader.submit(self._submit_or_refuse, identity, message)
        else:
            self._submit_or_refuse(identity, message)

    def _submit_or_refuse(self, identity: int, message: Generate) -> None:
        try:
            self._submit(identity, message)
        except Exception as error:  # noqa: BLE001 - answered, as every failure of one request
            self._forget(identity)
            self._refuse(identity, error)

    def _submit(self, identity: int, message: Generate) -> None:
        handle = self._engine.submit(
            message.text_input,
            message.params,
            lambda chunk: self._chunk(identity, chunk),
            on_error=lambda error: self._failed(identity, error),
            streaming=message.stream,
            timeout_s=message.timeout_s,
        )
        with self._lock:
            if identity in self._running:  # it may have ended before submit returned
                self._running[identity] = handle
            unwanted = identity in self._cancelled
            self._cancelled.discard(identity)
        if unwanted:
            handle.cancel()

    def _refuse(self, identity: int, error: Exception) -> None:
        if not isinstance(error, ToolchainError):
            error = ToolchainError(f"{type(error).__name__}: {error}", code="TC-504")
        self._writer.send(error_message(identity, error))

    def _cancel(self, identity: int) -> None:
        """Unknown ids are fine: the answer may have ended while the message was on its way."""
        with self._lock:
            handle = self._running.get(identity)
            if handle is None and identity in self._running:
                self._cancelled.add(identity)
        if handle is not None:
            handle.cancel()

    def _cancel_all(self) -> None:
        with self._lock:
            handles = [handle for handle in self._running.values() if handle is not None]
        for handle in handles:
            handle.cancel()
        for handle in handles:
            handle.wait()

    def _chunk(self, identity: int, chunk: Chunk) -> None:
        if chunk.finish_reason is not None:
            self._forget(identity)
        self._round.append(chunk_fields(identity, chunk, self._tokens))

    def _failed(self, identity: int, error: ToolchainError) -> None:
        self._forget(identity)
        self._round.append(error_message(identity, error))

    def _flush(self) -> None:
        """One message for everything since the last one, in its order."""
        if self._round:
            chunks, self._round = self._round, []
            load = self._engine.load_now()
            self._writer.send(
                {"op": "chunks", "chunks": chunks, "running": load.running, "waiting": load.waiting}
            )

    def _forget(self, identity: int) -> None:
        with self._lock:
            self._running.pop(identity, None)
            self._cancelled.discard(identity)
