"""The load: several clients at once, each sending its next request when its last one has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from toolchain.bench.prompts import TokenCounter
from toolchain.bench.records import Record
from toolchain.bench.types import Settings
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.triton.client import GenerateClient, Piece


@dataclass(frozen=True, kw_only=True)
class Load:
    url: str
    """host:port of the gRPC endpoint."""
    model: str
    concurrency: int
    settings: Settings
    counter: TokenCounter


def run_load(
    load: Load, prompts: list[str], progress: Progress, *, description: str
) -> tuple[list[Record], float]:
    """Send every prompt once. Returns the records and the seconds from the first request to the last answer.

    Tokens are counted after the load has ended: counting would compete with it for the CPU.
    """
    waiting = iter(prompts)
    lock = threading.Lock()
    answers: list[tuple[str, str, Record]] = []
    ended = threading.Semaphore(0)

    def client_loop() -> None:
        with GenerateClient(load.url, model=load.model) as client:
            while (prompt := _take(waiting, lock)) is not None:
                text, record = _ask(client, prompt, load.settings)
                with lock:
                    answers.append((prompt, text, record))
                ended.release()

    threads = [threading.Thread(target=client_loop, daemon=True) for _ in range(load.concurrency)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for _ in progress.track(range(len(prompts)), description=description, total=len(prompts)):
        ended.acquire()
    duration_s = time.perf_counter() - started_s
    for thread in threads:
        thread.join()
    return [_counted(prompt, text, record, load) for prompt, text, record in answers], duration_s


def _take(waiting: Iterator[str], lock: threading.Lock) -> str | None:
    with lock:
        return next(waiting, None)


def _ask(client: GenerateClient, prompt: str, settings: Settings) -> tuple[str, Record]:
    """The answer's text and its record. Whatever goes wrong becomes the record's ``error``."""
    inputs: dict[str, Any] = {
        "sampling_param_max_tokens": settings.output_tokens,
        "sampling_param_seed": settings.seed,
    }
    if settings.ignore_eos:
        inputs["sampling_param_ignore_eos"] = True
    pieces: list[Piece] = []
    error = None
    started_s = time.perf_counter()
    try:
        pieces.extend(client.stream(prompt, timeout_s=settings.timeout_s, **inputs))
    except ToolchainError as failure:
        error = failure.message
    except Exception as failure:  # noqa: BLE001 - the other clients would wait for a thread that died
        error = f"{type(failure).__name__}: {failure}"
    finished_s = pieces[-1].received_s if pieces and error is None else time.perf_counter()
    times = tuple(piece.received_s for piece in pieces if piece.text)
    record = Record(started_s=started_s, finished_s=finished_s, piece_s=times, error=error)
    return "".join(piece.text for piece in pieces), record


def _counted(prompt: str, text: str, record: Record, load: Load) -> Record:
    """At most the tokens that were asked for: broken characters split into more than produced them."""
    output_tokens = min(load.counter.count(text), int(load.settings.output_tokens))
    return replace(record, prompt_tokens=load.counter.count(prompt), output_tokens=output_tokens)
