"""One benchmark with aiperf: the same requests, in the same order, measured by the same definitions as our own.

What it is sent has warm-up, measured requests and those that keep the load up afterwards in one phase, so that both
generators meet the server in the same state; which requests count is decided here, as for our own.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolchain.bench.aiperf.command import Run, execute
from toolchain.bench.aiperf.export import Asked, read_export
from toolchain.bench.aiperf.installed import READ_VERSION, require_aiperf
from toolchain.bench.drive import Load
from toolchain.bench.environment import describe_environment
from toolchain.bench.gpu import gpus_of
from toolchain.bench.intervals import intervals
from toolchain.bench.prompts import TokenCounter
from toolchain.bench.records import Measured, Record
from toolchain.bench.settings import Settings
from toolchain.bench.statistics import summary
from toolchain.bench.targets import make_target
from toolchain.bench.targets.base import About, Request, TargetSpec
from toolchain.bench.types import BenchResult, Level, Repeat
from toolchain.bench.work import LevelLoad, Work
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Progress, Silent

TARGETS = ("triton-http", "openai")
CODE = "TC-710"
KEEPS_UP = 4
"""Open loop: one request for so many measured ones comes after them and keeps the load up."""
COUNTING = (
    "aiperf: the server's usage, or the engine tokenizer on the returned text, at most output_tokens each"
)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One repeat of one level."""

    measured: Measured
    warmup_errors: int
    started: str


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is the same for every level and repeat."""

    python: Path
    spec: TargetSpec
    settings: Settings
    tokenizer: Path
    """Directory of its files, absolute."""
    counter: TokenCounter
    work: Work
    progress: Progress


def run_aiperf(
    *,
    url: str,
    target: str,
    model: str,
    tokenizer_dir: Path,
    settings: Settings,
    engine_dir: Path | None = None,
    gpus: int | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure the server at ``url`` (http://host:port) with aiperf, in a process of its own for each level and repeat.

    ``target``: triton-http or openai. ``tokenizer_dir``: engine or checkpoint directory. UsageError TC-710 for what
    aiperf cannot be asked for; ToolchainError TC-711 when it is not installed, TC-713 when it fails; FindingsError
    TC-712 when its files are not what is expected; TC-704 when nothing at all succeeded.
    """
    _refuse(target, settings)
    counter = TokenCounter(tokenizer_dir)
    job = _Job(
        python=require_aiperf(),
        spec=TargetSpec(
            kind=target,
            url=url,
            model=model,
            endpoint=settings.endpoint,
            seed=settings.seed,
            ignore_eos=settings.ignore_eos,
        ),
        settings=settings,
        tokenizer=_tokenizer(tokenizer_dir),
        counter=counter,
        work=Work(settings, counter),
        progress=progress or Silent(),
    )
    about, sent = _measure(job)
    gpus = gpus if gpus is not None else gpus_of(engine_dir, seen=0)
    server = {"name": about.name, "version": about.version, "notes": list(about.notes)}
    environment = describe_environment(engine_dir=engine_dir, server=server)
    loop = f"open loop, {settings.arrival}" if settings.open_loop else "closed loop"
    return BenchResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        url=url,
        model=about.model,
        settings=replace(settings, target=target, ceiling=False),
        environment={**environment, "aiperf": READ_VERSION},
        levels=tuple(
            _level(level, sent[index], settings, gpus) for index, level in enumerate(job.work.levels)
        ),
        target=target,
        tool="aiperf",
        gpus=gpus,
        token_counting=COUNTING,
        load=f"{loop}, {target}, streaming",
    )


def _measure(job: _Job) -> tuple[About, dict[int, list[Sent]]]:
    """What the server says of itself, and level -> its repeats: every level once, then all of them again."""
    sent: dict[int, list[Sent]] = {}
    repeats = job.settings.repeats
    for repeat in range(repeats):
        for index, level in enumerate(job.work.levels):
            load = job.work.load(level, index=index, repeat=repeat)
            about, bodies = asyncio.run(_bodies(job.spec, _kept(load, level)))
            words = f"aiperf, {level.words}, repeat {repeat + 1} of {repeats}"
            with tempfile.TemporaryDirectory(prefix="aiperf-") as place:
                run = _run(job, level, about.model, len(bodies), Path(place))
                sent.setdefault(index, []).append(_send(run, load, bodies, job, words))
            if not repeat and not index:
                _refuse_all_failed(sent[0][0])
    return about, sent


def _run(job: _Job, level: LevelLoad, model: str, requests: int, place: Path) -> Run:
    return Run(
        python=job.python,
        url=job.spec.url,
        target=job.spec.kind,
        model=model,
        tokenizer_dir=job.tokenizer,
        settings=job.settings,
        concurrency=level.concurrency,
        rate=level.rate,
        requests=requests,
        payloads=place / "requests.json",
        artifacts=place / "artifacts",
    )


def _tokenizer(directory: Path) -> Path:
    """Where its files are, absolute: aiperf runs in a directory of its own."""
    inside = directory / "checkpoint"
    return (inside if inside.is_dir() else directory).absolute()


def _refuse(target: str, settings: Settings) -> None:
    """UsageError for what aiperf 0.13.0 cannot do, or what it would do in another way than asked for."""
    problems = []
    if target not in TARGETS:
        problems.append(f"target {target} (aiperf speaks HTTP only: {', '.join(TARGETS)})")
    if settings.trace is not None:
        problems.append("a trace (give lengths; aiperf reads traces of its own formats by itself)")
    if settings.duration_s is not None:
        problems.append("a duration (give a number of requests)")
    if problems:
        raise UsageError("aiperf cannot be asked for " + " or ".join(problems), code=CODE)


def _kept(load: Load, level: LevelLoad) -> Sequence[Request]:
    """aiperf cannot be told to stop when the last measured request has ended, so what follows has a fixed number."""
    if level.concurrency is not None:
        return load.requests
    return load.requests[: load.warmup + load.measured + load.measured // KEEPS_UP + 1]


async def _bodies(spec: TargetSpec, requests: Sequence[Request]) -> tuple[About, list[tuple[Request, Any]]]:
    """What the server says of itself, and the body that our own generator would send for each request."""
    target: Any = make_target(spec)
    try:
        about = await target.prepare()
        return about, [(request, target.body(request)) for request in requests]
    finally:
        await target.close()


def _send(
    run: Run,
    load: Load,
    bodies: Sequence[tuple[Request, Any]],
    job: _Job,
    description: str,
) -> Sent:
    asked = {
        f"{index:06d}": Asked(
            prompt_tokens=job.counter.count(request.prompt),
            output_tokens=request.max_tokens,
            measured=load.warmup <= index < load.warmup + load.measured,
        )
        for index, (request, _) in enumerate(bodies)
    }
    sessions = [
        {"session_id": name, "payloads": [body]} for name, (_, body) in zip(asked, bodies, strict=True)
    ]
    run.payloads.write_text(json.dumps({"data": sessions}), encoding="utf-8")
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    execute(run, job.progress, description=description)
    records = read_export(run.artifacts, asked, open_loop=run.rate is not None)
    counted = [record for record in records if record.measured]
    start_s, end_s = _window(counted)
    return Sent(
        measured=Measured(
            records=records, start_s=start_s, end_s=end_s, outstanding_peak=_outstanding(records)
        ),
        warmup_errors=sum(
            record.error is not None and not record.measured and record.started_s < start_s
            for record in records
        ),
        started=started,
    )


def _window(counted: Sequence[Record]) -> tuple[float, float]:
    """From the first measured request to the end of the last one: all through it the load is complete."""
    return min(record.started_s for record in counted), max(record.finished_s for record in counted)


def _outstanding(records: Sequence[Record]) -> int:
    """Most requests at once."""
    changes = sorted(
        change
        for record in records
        for change in ((record.sent_s or record.started_s, 1), (record.finished_s, -1))
    )
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak


def _refuse_all_failed(sent: Sent) -> None:
    messages = [record.error for record in sent.measured.counted]
    if any(message is None for message in messages):
        return
    most = max(set(messages), key=messages.count)
    raise ToolchainError(
        f"every request failed ({len(messages)} of {len(messages)}); {messages.count(most)} times: {most}",
        hint="look into the server's log",
        code="TC-704",
    )


def _level(load: LevelLoad, sent: Sequence[Sent], settings: Settings, gpus: int | None) -> Level:
    repeats = tuple(
        Repeat(**summary([each.measured], settings=settings, gpus=gpus), started=each.started)
        for each in sent
    )
    return Level(
        **summary([each.measured for each in sent], settings=settings, gpus=gpus),
        concurrency=load.concurrency,
        rate=load.rate,
        warmup_errors=sum(each.warmup_errors for each in sent),
        repeats=repeats,
        intervals=intervals(repeats),
    )
