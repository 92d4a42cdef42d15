"""The local engine as a process of its own: ``python -m toolchain.runtime.worker ENGINE_DIR``.

Requests come as JSON lines on stdin, answers leave as JSON lines on stdout, everything else goes to stderr. A
server that cannot share our Python environment (Triton's Python backend needs numpy < 2) talks to this
process, and a crash here does not take the server down.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable
from typing import IO, Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.protocol import NO_REQUEST, error_message, parse_line, parse_params, request_id
from toolchain.runtime.request import RequestHandle
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
            except BrokenPipeError:
                self.broken = True


class Worker:
    """Feeds requests of one parent to one engine."""

    def __init__(self, engine: LocalEngine, writer: Writer) -> None:
        self._engine = engine
        self._writer = writer
        self._running: dict[int, RequestHandle | None] = {}
        """Requests by id; None between the moment an id is taken and its submission."""
        self._lock = threading.Lock()

    def serve(self, lines: Iterable[bytes]) -> None:
        """Handle messages until ``shutdown`` or the end of ``lines``."""
        limits = self._engine.limits
        self._writer.send(
            {
                "op": "ready",
                "model": self._engine.name,
                "max_batch_size": limits.max_batch_size,
                "max_seq_len": limits.max_seq_len,
            }
        )
        for line in lines:
            if line.strip() and not self._handle(line):
                break
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
                self._generate(identity, message)
            else:
                self._cancel(identity)
        except ToolchainError as error:
            self._writer.send(error_message(identity, error))
        except Exception as error:  # noqa: BLE001 - one message must not end the service of all others
            failure = ToolchainError(f"{type(error).__name__}: {error}", code="TC-504")
            self._writer.send(error_message(identity, failure))
        return True

    def _generate(self, identity: int, message: dict[str, Any]) -> None:
        text = message.get("text_input")
        if not isinstance(text, str):
            raise UsageError(f'expected a string "text_input", got {type(text).__name__}', code="TC-511")
        unknown = sorted(set(message) - {"op", "id", "text_input", "params"})
        if unknown:
            raise UsageError(f"unknown fields {', '.join(unknown)}", code="TC-511")
        params = parse_params(message.get("params"))
        with self._lock:
            if identity in self._running:
                raise UsageError(f"id {identity} belongs to a request that still runs", code="TC-511")
            self._running[identity] = None
        try:
            handle = self._engine.submit(
                text,
                params,
                lambda chunk: self._chunk(identity, chunk),
                on_error=lambda error: self._failed(identity, error),
            )
        except BaseException:
            self._forget(identity)
            raise
        with self._lock:
            if identity in self._running:  # it may have ended before submit returned
                self._running[identity] = handle

    def _cancel(self, identity: int) -> None:
        """Unknown ids are fine: the answer may have ended while the message was on its way."""
        with self._lock:
            handle = self._running.get(identity)
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
        self._writer.send(
            {
                "op": "chunk",
                "id": identity,
                "text": chunk.text,
                "token_ids": list(chunk.token_ids),
                "finish_reason": chunk.finish_reason,
                "prompt_tokens": chunk.prompt_tokens,
            }
        )

    def _failed(self, identity: int, error: ToolchainError) -> None:
        self._forget(identity)
        self._writer.send(error_message(identity, error))

    def _forget(self, identity: int) -> None:
        with self._lock:
            self._running.pop(identity, None)


def claim_stdout() -> IO[bytes]:
    """Take stdout for the protocol: descriptor 1 becomes stderr, also for libraries that write to it."""
    sys.stdout.flush()
    protocol = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return protocol


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toolchain.runtime.worker", description=__doc__)
    parser.add_argument("engine", help="engine directory or checkpoint directory")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--max-batch-size", type=int, default=None, help="at most what the engine was planned for"
    )
    options = parser.parse_args(arguments)
    writer = Writer(claim_stdout())
    # Ctrl-C reaches the whole process group; the parent decides how its requests end and then closes stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = LocalEngine.load(
            options.engine, device=options.device, max_batch_size=options.max_batch_size
        )
    except ToolchainError as error:
        writer.send({"op": "failed", "message": error_message(NO_REQUEST, error)["message"]})
        return 1
    except Exception as error:  # noqa: BLE001 - the parent waits for ready or failed, it reads no traceback
        writer.send({"op": "failed", "message": f"{type(error).__name__}: {error}"})
        return 1
    with engine:
        Worker(engine, writer).serve(sys.stdin.buffer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
