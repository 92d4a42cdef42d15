"""Who is sent when: a target that answers when the test lets it, so that nothing depends on the clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from toolchain.bench.drive import Driven, Driver, Load
from toolchain.bench.generator import load_from_json, load_to_json
from toolchain.bench.measure import Sent, send_repeat
from toolchain.bench.targets.base import About, Piece, Request, RequestError
from toolchain.core.progress import Silent


class Scripted:
    """Answers ``max_tokens`` pieces, letting others run between them; notes how many requests run at once."""

    def __init__(
        self, *, fails: set[int] | None = None, gate: int = 0, silent: set[int] | None = None
    ) -> None:
        """``fails``, ``silent``: numbers of requests, in the order of their coming. ``gate``: nobody is answered
        before so many are there."""
        self.open = self.peak = self.taken = 0
        self.users: list[int] = []
        """How many requests ran when each was taken, itself included."""
        self._fails, self._silent, self._gate = fails or set(), silent or set(), gate
        self._here = asyncio.Event()

    async def prepare(self) -> About:
        return About(name="scripted", version="1", model="m")

    async def send(self, request: Request) -> AsyncIterator[Piece]:
        number, self.taken = self.taken, self.taken + 1
        self.open += 1
        self.users.append(self.open)
        self.peak = max(self.peak, self.open)
        try:
            if self.taken >= self._gate:
                self._here.set()
            await self._here.wait()
            if number in self._silent:
                await asyncio.sleep(60)
            if number in self._fails:
                raise RequestError("scripted failure")
            for index in range(request.max_tokens):
                await asyncio.sleep(0.001)
                yield Piece(time.perf_counter(), f" {number}", 3, index + 1)
            yield Piece(time.perf_counter(), "", 3, request.max_tokens)
        finally:
            self.open -= 1

    async def close(self) -> None:
        return None


def requests(count: int, tokens: int = 4) -> list[Request]:
    return [Request(prompt=f"prompt {index}", max_tokens=tokens) for index in range(count)]


def drive(target: Scripted, load: Load) -> Driven:
    return asyncio.run(Driver(target, load, lambda answer: None).run())


def test_every_measured_request_of_a_closed_loop_sees_all_users() -> None:
    target = Scripted()
    driven = drive(target, Load(requests=requests(40), warmup=4, measured=12, concurrency=4))
    measured = [answer for answer in driven.answers if answer.measured]
    assert sorted(answer.index for answer in measured) == list(range(4, 16))
    assert target.peak == driven.outstanding_peak == 4
    last = max(answer.finished_s for answer in measured)
    for at in [answer.sent_s for answer in measured] + [answer.finished_s for answer in measured]:
        # Whenever a measured request begins or ends, up to the last, no user is idle or gone.
        running = sum(answer.sent_s <= at <= answer.finished_s for answer in driven.answers)
        assert running >= 3 or at == last
    assert all(answer.sent_s < last for answer in driven.answers), "nothing is sent when all are answered"
    assert all(answer.text == f" {answer.text.split()[0]}" * 4 for answer in driven.answers)


def test_a_closed_loop_begins_again_with_its_prompts() -> None:
    driven = drive(Scripted(), Load(requests=requests(3, 1), warmup=1, measured=7, concurrency=1))
    assert [answer.index for answer in driven.answers] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert sum(answer.measured for answer in driven.answers) == 7


def test_a_closed_loop_for_a_time() -> None:
    load = Load(requests=requests(50), warmup=2, measured=0, concurrency=2, duration_s=0.1)
    driven = drive(Scripted(), load)
    measured = [answer for answer in driven.answers if answer.measured]
    begin = min(answer.sent_s for answer in measured)
    assert measured and all(answer.sent_s - begin < 0.1 for answer in measured)
    assert all(
        answer.measured or answer.sent_s <= begin or answer.sent_s - begin >= 0.1 for answer in driven.answers
    )


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """Nobody is answered before all ten are there: a closed loop would wait for ever."""
    target = Scripted(gate=10)
    due = [0.001 * index for index in range(10)]
    driven = drive(target, Load(requests=requests(10), warmup=0, measured=10, due_s=due, timeout_s=20.0))
    assert [answer.error for answer in driven.answers] == [None] * 10
    assert (target.peak, driven.held_back) == (10, 0)
    for answer in driven.answers:
        assert answer.due_s == pytest.approx(driven.started_s + due[answer.index])
        assert answer.sent_s >= answer.due_s, "nobody comes before their time"


def test_what_is_due_beyond_the_limit_waits_and_is_counted() -> None:
    target = Scripted()
    load = Load(requests=requests(12, 20), warmup=0, measured=12, due_s=[0.0] * 12, max_outstanding=3)
    driven = drive(target, load)
    assert target.peak == 3 and driven.held_back == 9
    assert len(driven.answers) == 12 and all(answer.due_s == driven.started_s for answer in driven.answers)


def test_an_open_loop_ends_when_its_measured_requests_are_answered() -> None:
    due = [0.0, 0.0, *(0.05 * index for index in range(1, 400))]
    driven = drive(Scripted(), Load(requests=requests(401, 2), warmup=0, measured=2, due_s=due))
    assert sum(answer.measured for answer in driven.answers) == 2 and len(driven.answers) < 400


def test_failed_and_silent_requests_do_not_stop_the_others() -> None:
    target = Scripted(fails={3}, silent={5})
    driven = drive(target, Load(requests=requests(30), warmup=2, measured=10, concurrency=2, timeout_s=0.5))
    found = {answer.index: answer.error for answer in driven.answers if answer.measured}
    assert found[3] == "scripted failure" and found[5] == "did not finish its answer within 0.5 s"
    assert len(found) == 10 and sum(error is not None for error in found.values()) == 2
    assert target.open == 0, "a request that is given up is ended"


def test_a_target_that_breaks_is_an_error_of_the_request() -> None:
    class Broken(Scripted):
        async def send(self, request: Request) -> AsyncIterator[Piece]:
            raise OSError("no route")
            yield

    class Empty(Scripted):
        async def send(self, request: Request) -> AsyncIterator[Piece]:
            for piece in ():
                yield piece

    load = Load(requests=requests(1), warmup=0, measured=1, concurrency=1)
    assert drive(Broken(), load).answers[0].error == "OSError: no route"
    assert "empty" in (drive(Empty(), load).answers[0].error or "")


def test_loads_survive_the_way_to_the_generator() -> None:
    load = Load(requests=requests(2), warmup=1, measured=1, due_s=[0.0, 0.25], timeout_s=3.0)
    assert load_from_json(load_to_json(load)) == load


class Words:
    """A tokenizer of words."""

    def count(self, text: str) -> int:
        return len(text.split())


class Here:
    """A sender in this process."""

    own_process = False

    def __init__(self, target: Any) -> None:
        self._target = target

    def run(self, load: Load, on_ended: Any) -> Driven:
        return asyncio.run(Driver(self._target, load, lambda answer: on_ended()).run())


def send(target: Scripted, load: Load) -> Sent:
    return send_repeat(Here(target), load, counter=Words(), progress=Silent(), description="")  # type: ignore[arg-type]


def test_the_window_of_a_closed_loop() -> None:
    sent = send(Scripted(), Load(requests=requests(40), warmup=2, measured=6, concurrency=2))
    counted = sent.measured.counted
    assert sent.window == (
        min(record.started_s for record in counted),
        max(record.finished_s for record in counted),
    )
    assert len(counted) == 6 and sent.counted_by_server == 6
    assert {(record.prompt_tokens, record.output_tokens, len(record.piece_s)) for record in counted} == {
        (3, 4, 4)
    }


def test_the_window_of_an_open_loop_is_the_time_in_which_requests_were_due() -> None:
    due = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
    sent = send(Scripted(fails={0}), Load(requests=requests(6), warmup=1, measured=3, due_s=due))
    start, end = sent.window
    assert start - sent.driven.started_s == pytest.approx(0.02) and end - start == pytest.approx(0.06)
    assert sent.warmup_errors == 1 and not sent.failed_entirely


def test_tokens_are_counted_with_the_tokenizer_where_the_server_does_not_say() -> None:
    class Mute(Scripted):
        async def send(self, request: Request) -> AsyncIterator[Piece]:
            yield Piece(time.perf_counter(), "one two three")
            yield Piece(time.perf_counter(), " four five six seven")

    sent = send(Mute(), Load(requests=requests(1, 5), warmup=0, measured=1, concurrency=1))
    (record,) = sent.measured.counted
    assert record.prompt_tokens == 2, "the words of 'prompt 0'"
    assert record.output_tokens == 5, "never more than were asked for"
    assert sent.counted_by_server == 0
