"""``toolchain bench``: something that answers requests, under load at several levels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolchain.bench.ceiling import Ceiling, judge
from toolchain.bench.connect import PROTOCOLS, target_of
from toolchain.bench.environment import describe_environment
from toolchain.bench.gpu import GpuSampler, gpus_of
from toolchain.bench.intervals import intervals
from toolchain.bench.measure import Sent, send_repeat
from toolchain.bench.memory import memory_of
from toolchain.bench.process import Sender, start_sender
from toolchain.bench.prompts import TokenCounter
from toolchain.bench.records_file import write_records
from toolchain.bench.settings import Settings
from toolchain.bench.statistics import summary
from toolchain.bench.targets.base import TargetSpec
from toolchain.bench.types import BenchResult, Level, Repeat
from toolchain.bench.work import LevelLoad, Work
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress, Silent
from toolchain.triton.server import TritonServer


@dataclass(kw_only=True)
class Run:
    """What a benchmark has found so far."""

    settings: Settings
    spec: TargetSpec
    work: Work
    sender: Sender
    counter: TokenCounter
    sampler: GpuSampler
    progress: Progress
    gpus: int | None
    watch_gpus: bool
    sent: dict[int, list[Sent]] = field(default_factory=dict)
    """Level -> its repeats."""


def run_bench(
    server: TritonServer | Path | str,
    *,
    tokenizer_dir: Path,
    settings: Settings | None = None,
    engine_dir: Path | None = None,
    model: str = "",
    gpus: int | None = None,
    records: Path | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure ``server``: a running Triton, the address of a server, or (a Path) an engine, in this process.

    ``tokenizer_dir``: engine or checkpoint directory. ``engine_dir``: whose manifest hash goes into the result.
    ``gpus``: what tokens/s per GPU divides by; None: found out. ``records``: JSON lines, one for each request.

    Failed requests are counted in the result. Ctrl-C ends it with what was measured, marked as partial. Raises
    UsageError for settings, addresses and traces that cannot be used, ToolchainError when nothing at all succeeded
    (TC-704) or the server cannot be measured (TC-702).
    """
    settings, progress = settings or Settings(), progress or Silent()
    spec, local = target_of(server, settings, model)
    counter = TokenCounter(tokenizer_dir)
    work = Work(settings, counter)
    with GpuSampler() as sampler, start_sender(spec) as sender:
        for note in sender.about.notes:
            progress.note(note)
        run = Run(
            settings=settings,
            spec=spec,
            work=work,
            sender=sender,
            counter=counter,
            sampler=sampler,
            progress=progress,
            gpus=gpus if gpus is not None else gpus_of(engine_dir, seen=sampler.count if local else 0),
            watch_gpus=local,
        )
        interrupted = _measure(run)
        levels = _judged(run, with_ceiling=settings.ceiling and not interrupted)
    if records is not None:
        write_records(records, run.sent, work.levels)
    environment = describe_environment(
        engine_dir=engine_dir, server=_server(sender), memory=memory_of(server)
    )
    return _result(run, levels, environment, interrupted=interrupted)


def _server(sender: Sender) -> dict[str, Any]:
    about = sender.about
    return {"name": about.name, "version": about.version, "notes": list(about.notes)}


def _result(
    run: Run, levels: tuple[Level, ...], environment: dict[str, Any], *, interrupted: bool
) -> BenchResult:
    spec = run.spec
    return BenchResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        url="" if spec.kind == "inprocess" else spec.url,
        model=run.sender.about.model,
        settings=replace(run.settings, target=spec.kind),
        environment=environment,
        levels=levels,
        target=spec.kind,
        gpus=run.gpus,
        partial=interrupted,
        token_counting=_counting(run),
        load=_words(run),
    )


def _measure(run: Run) -> bool:
    """Every level once, then all of them again: what changes with time changes all of them. True after Ctrl-C."""
    levels = run.work.levels
    try:
        if (warm_up := run.work.warm_up()) is not None:
            run.sender.run(warm_up, lambda: None)
        for repeat in range(run.settings.repeats):
            for index, level in enumerate(levels):
                words = level.words
                if run.settings.repeats > 1:
                    words += f", repeat {repeat + 1} of {run.settings.repeats}"
                load = run.work.load(level, index=index, repeat=repeat)
                sent = send_repeat(
                    run.sender, load, counter=run.counter, progress=run.progress, description=words
                )
                if not run.sent and sent.failed_entirely:
                    raise _all_failed(sent)
                run.sent.setdefault(index, []).append(sent)
    except KeyboardInterrupt:
        if not run.sent:
            raise
        run.progress.note("interrupted: what was measured so far is the result")
        return True
    return False


def _all_failed(sent: Sent) -> ToolchainError:
    messages = [record.error for record in sent.measured.counted]
    most = max(set(messages), key=messages.count)
    return ToolchainError(
        f"every request failed ({len(messages)} of {len(messages)}); {messages.count(most)} times: {most}",
        hint="look into the server's log",
        code="TC-704",
    )


def _judged(run: Run, *, with_ceiling: bool) -> tuple[Level, ...]:
    """The levels; without the ceiling of the generator when Ctrl-C ends its measurement."""
    try:
        return _levels(run, with_ceiling=with_ceiling)
    except KeyboardInterrupt:
        run.progress.note("interrupted: the load generator's own ceiling was not measured")
        return _levels(run, with_ceiling=False)


def _levels(run: Run, *, with_ceiling: bool) -> tuple[Level, ...]:
    levels = run.work.levels
    with contextlib.ExitStack() as stack:
        ceiling = stack.enter_context(Ceiling(run.spec)) if with_ceiling else None
        return tuple(_level(run, levels[index], run.sent[index], ceiling) for index in sorted(run.sent))


def _level(run: Run, load: LevelLoad, sent: Sequence[Sent], ceiling: Ceiling | None) -> Level:
    repeats = tuple(
        Repeat(
            **summary([item.measured], settings=run.settings, gpus=run.gpus),
            started=item.started,
            gpu=_gpu(run, [item]),
        )
        for item in sent
    )
    level = Level(
        **summary([item.measured for item in sent], settings=run.settings, gpus=run.gpus),
        concurrency=load.concurrency,
        rate=load.rate,
        warmup_errors=sum(item.warmup_errors for item in sent),
        repeats=repeats,
        intervals=intervals(repeats),
        gpu=_gpu(run, sent),
    )
    pace_ms = level.tpot_ms.p50 if level.tpot_ms else 0.0
    bare = None
    if ceiling is not None and level.ttft_ms is not None:
        run.progress.note(f"{load.words}: what the load generator itself can do")
        users = load.concurrency or max(1, level.outstanding_peak)
        bare = ceiling.measure(sent[-1].load, users=users, pace_ms=pace_ms)
    driven = [item.driven for item in sent]
    found = judge(level, bare, driven, own_process=run.sender.own_process, pace_ms=pace_ms)
    return replace(level, generator=found)


def _gpu(run: Run, sent: Sequence[Sent]) -> Any:
    if not run.watch_gpus:
        return None
    tokens = sum(item.measured.tokens_within() for item in sent)
    return run.sampler.use([item.window for item in sent], tokens=tokens)


def _counting(run: Run) -> str:
    sent = [item for items in run.sent.values() for item in items]
    good = sum(record.error is None for item in sent for record in item.measured.counted)
    by_server = sum(item.counted_by_server for item in sent)
    words = "engine tokenizer on the returned text, at most output_tokens each"
    if not by_server:
        return words
    return (
        "by the server"
        if by_server == good
        else f"by the server for {by_server} of {good} requests, else {words}"
    )


def _words(run: Run) -> str:
    protocol = PROTOCOLS[run.spec.kind].format(endpoint=run.spec.endpoint)
    if run.work.replays:
        return f"open loop, times of a trace, {protocol}"
    return (
        f"open loop, {run.settings.arrival}, {protocol}"
        if run.settings.open_loop
        else f"closed loop, {protocol}"
    )
