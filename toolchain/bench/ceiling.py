"""What the generator itself can do: the same load, by the same code, against a server that does nothing."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from toolchain.bench.drive import Driven, Load
from toolchain.bench.null_server import NAME
from toolchain.bench.process import InThisProcess, Sender, start_sender
from toolchain.bench.statistics import percentile
from toolchain.bench.targets.base import TargetSpec
from toolchain.bench.types import Generator, Level
from toolchain.core.errors import ToolchainError

BUSY = 0.8
"""CPU of the generator in cores beyond which it may wait for itself."""
IDLE = 0.5
"""Below it a lag is not of the generator's own making: server and generator share too few cores, or others run."""
OF_CEILING = 0.5
LAG_MS = 10.0
LAG_OF_ITL = 0.1
FEWEST_REQUESTS, MOST_TOKENS = 8, 20_000
PACED_S = 1.0
"""About how long the measurement at the server's pace takes."""


@dataclass(frozen=True, kw_only=True)
class Bare:
    """The generator alone, at one load."""

    tokens_per_s: float
    cpu_share: float
    added_ttft_ms: float
    jitter_p99_ms: float


class NullServer:
    """The process of ``null_server``."""

    def __init__(self, protocol: str) -> None:
        """``protocol``: sse or grpc."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "toolchain.bench.null_server", protocol],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            process_group=0,
        )
        self.port = int(self._line())

    def pace(self, period_ms: float) -> None:
        """Milliseconds from token to token; 0 as fast as it can."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{period_ms}\n")
        self._process.stdin.flush()
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ToolchainError("the server for measuring the generator did not start", code="TC-707")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Null(Protocol):
    """A server or an engine that does nothing."""

    def pace(self, period_ms: float) -> None: ...

    def close(self) -> None: ...


class Ceiling:
    """Measures the generator. The server and the second generator start at the first use; a context manager."""

    def __init__(self, spec: TargetSpec) -> None:
        self._spec = spec
        self._stack = contextlib.ExitStack()
        self._null: Null | None = None
        self._sender: Sender | None = None

    def __enter__(self) -> Ceiling:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, load: Load, *, users: int, pace_ms: float) -> Bare:
        """``load``: one that was measured; its requests are sent again by ``users`` at once, as fast as the server can
        and then at ``pace_ms`` per token."""
        server, sender = self._started()
        length = max(2, round(sum(item.max_tokens for item in load.requests) / len(load.requests)))
        most = max(FEWEST_REQUESTS, 2 * users)
        count = max(most, min(16 * most, MOST_TOKENS // length))
        server.pace(0.0)
        fast = sender.run(_again(load, users=users, count=count), _nothing)
        tokens, seconds = _arrived(fast)
        pace_ms = max(0.5, pace_ms)
        rounds = max(1, round(PACED_S * 1000 / (pace_ms * length)))
        shorter = max(2, min(length, round(PACED_S * 1000 / pace_ms)))
        server.pace(pace_ms)
        slow = sender.run(_again(load, users=users, count=rounds * users, length=shorter), _nothing)
        ttft = [answer.piece_s[0] - answer.sent_s for answer in slow.answers if answer.piece_s]
        late = list(_lateness(slow, pace_ms / 1000))
        return Bare(
            tokens_per_s=tokens / seconds if seconds else 0.0,
            cpu_share=fast.cpu_share,
            added_ttft_ms=sum(ttft) / max(1, len(ttft)) * 1000,
            jitter_p99_ms=percentile(late, 99) * 1000 if late else 0.0,
        )

    def _started(self) -> tuple[Null, Sender]:
        if self._null is None or self._sender is None:
            inside = self._spec.kind == "inprocess"
            self._null, sender = self._inside() if inside else self._outside()
            self._sender = self._stack.enter_context(sender)
        return self._null, self._sender

    def _outside(self) -> tuple[Null, Sender]:
        protocol = "grpc" if self._spec.kind == "triton-grpc" else "sse"
        server = NullServer(protocol)
        self._stack.callback(server.close)
        address = f"127.0.0.1:{server.port}"
        url = address if protocol == "grpc" else f"http://{address}"
        return server, start_sender(replace(self._spec, url=url, model=NAME))

    def _inside(self) -> tuple[Null, Sender]:
        from toolchain.bench.null_engine import NullEngine
        from toolchain.bench.targets.inprocess import InProcess

        engine = NullEngine()
        return engine, InThisProcess(InProcess(self._spec, engine))


def judge(
    level: Level, bare: Bare | None, driven: Sequence[Driven], *, own_process: bool, pace_ms: float
) -> Generator:
    """Whether the generator stood in the way of ``level``, and by which figure."""
    cpu = max((each.cpu_share for each in driven), default=0.0) if own_process else None
    lags = [lag for each in driven for lag in each.lag_s]
    lag_ms = percentile(lags, 99) * 1000 if lags else 0.0
    late = [
        answer.sent_s - answer.due_s
        for each in driven
        for answer in each.answers
        if answer.due_s is not None and answer.measured
    ]
    own = bare is not None and (bare.cpu_share > BUSY or not own_process)
    return Generator(
        ceiling_tokens_per_s=bare.tokens_per_s if bare else None,
        ceiling_by="" if bare is None else "generator" if own else "null server",
        added_ttft_ms=bare.added_ttft_ms if bare else None,
        jitter_p99_ms=bare.jitter_p99_ms if bare else None,
        cpu_share=cpu,
        lag_p99_ms=lag_ms,
        send_lag_p99_ms=percentile(late, 99) * 1000 if late else None,
        limited=bool(why := tuple(_reasons(level, bare, cpu, lag_ms, pace_ms))),
        why=why,
    )


def _reasons(
    level: Level, bare: Bare | None, cpu: float | None, lag_ms: float, pace_ms: float
) -> Iterator[str]:
    rate = level.output_tokens_per_s
    if bare is not None and rate > OF_CEILING * bare.tokens_per_s:
        share = rate / bare.tokens_per_s if bare.tokens_per_s else float("inf")
        yield f"{rate:.0f} tokens/s are {share:.0%} of the {bare.tokens_per_s:.0f} that the generator can receive"
    # In one process others take the times, so that only a lag that delays the sending matters.
    relative = cpu is not None and pace_ms > 0 and lag_ms > LAG_OF_ITL * pace_ms
    if lag_ms > LAG_MS or relative:
        limit = f"{LAG_MS:g} ms" if lag_ms > LAG_MS else f"{LAG_OF_ITL:.0%} of the ITL of {pace_ms:.2f} ms"
        others = (
            f"; it used only {cpu:.0%} of a core: the machine is busy"
            if cpu is not None and cpu < IDLE
            else ""
        )
        yield f"its event loop was {lag_ms:.2f} ms late (p99), more than {limit}{others}"
    if cpu is not None and cpu > BUSY:
        yield f"it used {cpu:.0%} of a core"


def _again(load: Load, *, users: int, count: int, length: int | None = None) -> Load:
    requests = [load.requests[index % len(load.requests)] for index in range(min(count, len(load.requests)))]
    if length is not None:
        requests = [replace(item, max_tokens=min(item.max_tokens, length)) for item in requests]
    return Load(requests=requests, warmup=users, measured=count, concurrency=users, timeout_s=60.0)


def _arrived(driven: Driven) -> tuple[int, float]:
    """Tokens and seconds of the measured requests."""
    answers = [answer for answer in driven.answers if answer.measured and answer.piece_s]
    start = min((answer.sent_s for answer in answers), default=0.0)
    end = max((answer.finished_s for answer in answers), default=0.0)
    pieces: list[Any] = [at for answer in driven.answers for at in answer.piece_s if start <= at <= end]
    return len(pieces), end - start


def _lateness(driven: Driven, pace_s: float) -> Iterator[float]:
    for answer in driven.answers:
        for sooner, later in pairwise(answer.piece_s):
            yield max(0.0, later - sooner - pace_s)


def _nothing() -> None:
    return None
