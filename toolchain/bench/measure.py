"""One repeat of one level: sent, and turned into records of requests within a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from toolchain.bench.drive import Answer, Driven, Load
from toolchain.bench.process import Sender
from toolchain.bench.prompts import TokenCounter
from toolchain.bench.records import Measured, Record
from toolchain.core.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A repeat that was sent."""

    load: Load
    driven: Driven
    measured: Measured
    started: str
    """UTC, ISO 8601."""
    warmup_errors: int
    counted_by_server: int
    """Successful measured requests whose tokens the server counted."""

    @property
    def window(self) -> tuple[float, float]:
        return self.measured.start_s, self.measured.end_s

    @property
    def failed_entirely(self) -> bool:
        return all(record.error is not None for record in self.measured.counted)


def send_repeat(
    sender: Sender, load: Load, *, counter: TokenCounter, progress: Progress, description: str
) -> Sent:
    """Send ``load`` and count its tokens afterwards: counting would compete with it for the CPU."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    total = load.warmup + load.measured if load.duration_s is None else None
    bar = iter(progress.track(range(total or 1_000_000_000), description=description, total=total))
    next(bar, None)

    def step() -> None:
        next(bar, None)

    driven = sender.run(load, step)
    for _ in range(1 if total is None else total):
        if next(bar, None) is None:
            break
    return _sent(load, driven, counter=counter, started=started)


def _sent(load: Load, driven: Driven, *, counter: TokenCounter, started: str) -> Sent:
    tokens = {index: counter.count(load.requests[index].prompt) for index in _uncounted_prompts(driven)}
    records = tuple(_record(answer, load, tokens, counter) for answer in driven.answers)
    start_s, end_s = _window(load, driven)
    first = min((answer.sent_s for answer in driven.answers if answer.measured), default=driven.started_s)
    return Sent(
        load=load,
        driven=driven,
        measured=Measured(
            records=records,
            start_s=start_s,
            end_s=end_s,
            open_loop=load.due_s is not None,
            held_back=driven.held_back,
            outstanding_peak=driven.outstanding_peak,
        ),
        started=started,
        warmup_errors=sum(
            answer.error is not None and answer.sent_s < first and not answer.measured
            for answer in driven.answers
        ),
        counted_by_server=sum(
            answer.measured and answer.error is None and answer.output_tokens is not None
            for answer in driven.answers
        ),
    )


def _uncounted_prompts(driven: Driven) -> set[int]:
    return {
        answer.index for answer in driven.answers if answer.prompt_tokens is None and answer.error is None
    }


def _record(answer: Answer, load: Load, tokens: dict[int, int], counter: TokenCounter) -> Record:
    """By the tokenizer at most the tokens that were asked for: broken characters split into more than made them."""
    output = answer.output_tokens
    if output is None:
        output = min(counter.count(answer.text), load.requests[answer.index].max_tokens)
    prompt = answer.prompt_tokens if answer.prompt_tokens is not None else tokens.get(answer.index, 0)
    return Record(
        started_s=answer.sent_s if answer.due_s is None else answer.due_s,
        sent_s=answer.sent_s,
        finished_s=answer.finished_s,
        piece_s=tuple(answer.piece_s),
        prompt_tokens=prompt,
        output_tokens=output if answer.error is None else 0,
        error=answer.error,
        measured=answer.measured,
    )


def _window(load: Load, driven: Driven) -> tuple[float, float]:
    """Closed loop: from the first measured request to the end of the last one, with all users busy. Open loop: the
    time in which the measured requests were due; of a trace, which ends with them, to the last answer."""
    measured: Sequence[Answer] = [answer for answer in driven.answers if answer.measured]
    end_s = max((answer.finished_s for answer in measured), default=driven.started_s)
    if load.due_s is None:
        return min((answer.sent_s for answer in measured), default=driven.started_s), end_s
    after = load.warmup + load.measured
    if after < len(load.due_s):
        end_s = driven.started_s + load.due_s[after]
    return driven.started_s + load.due_s[load.warmup], end_s
