"""Limits: what is refused before it waits, what waits no longer, and what is refused before it is tokenized."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.runtime.encode import LONG_BYTES, Encoder
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.request import RequestHandle
from toolchain.runtime.types import Chunk, SamplingParams
from toolchain.runtime.waiting import QueueLimits

Tiny = Callable[[str], Path]
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


def quiet(chunk: Chunk) -> None:
    return None


@contextmanager
def busy(directory: Path, **limits: Any) -> Iterator[tuple[LocalEngine, RequestHandle]]:
    """An engine with one row, which a long answer holds."""
    with LocalEngine.load(directory, device="cpu", max_batch_size=1, queue=QueueLimits(**limits)) as engine:
        started = threading.Event()
        running = engine.submit("abc", LONG, lambda chunk: started.set())
        assert started.wait(30)
        yield engine, running
        running.cancel()


def test_a_queue_full_of_requests_refuses_the_next(tiny: Tiny) -> None:
    with busy(tiny("llama"), max_waiting=1) as (engine, running):
        waiting = engine.submit("abc", SHORT, quiet)
        with pytest.raises(ToolchainError, match="1 requests are waiting already") as caught:
            engine.submit("abc", SHORT, quiet)
        assert caught.value.code == "TC-505"
        assert (engine.load_now().running, engine.load_now().waiting) == (1, 1)
        running.cancel()
        assert len(waiting.result(30).token_ids) == 2
        assert len(engine.generate("abc", SHORT).token_ids) == 2


def test_without_a_queue_a_request_runs_when_there_is_a_row(tiny: Tiny) -> None:
    with busy(tiny("llama"), max_waiting=0) as (engine, running):
        with pytest.raises(ToolchainError, match="0 requests are waiting"):
            engine.submit("abc", SHORT, quiet)
        running.cancel()
        running.result(30)
        for _ in range(20):
            assert len(engine.generate("abc", SHORT).token_ids) == 2


def test_a_queue_full_of_prompt_tokens_refuses_the_next(tiny: Tiny) -> None:
    with busy(tiny("llama"), max_waiting_tokens=100) as (engine, running):
        # One alone may wait, however long it is: it could never be answered otherwise.
        handles = [engine.submit("x" * 150, SHORT, quiet)]
        said = "1 requests with 150 prompt tokens are waiting already, and this one has 3: .* at most 100"
        with pytest.raises(ToolchainError, match=said) as caught:
            engine.submit("abc", SHORT, quiet)
        assert caught.value.code == "TC-505"
        handles[0].cancel()
        handles[0].result(30)
        handles = [engine.submit("x" * 50, SHORT, quiet) for _ in range(2)]
        assert engine.load_now().tokens == 100
        with pytest.raises(ToolchainError, match="2 requests with 100 prompt tokens"):
            engine.submit("abc", SHORT, quiet)
        running.cancel()
        assert all(len(handle.result(30).token_ids) == 2 for handle in handles)


def test_a_request_does_not_wait_longer_than_the_engine_allows(tiny: Tiny) -> None:
    with busy(tiny("llama"), max_queue_s=0.05) as (engine, _):
        with pytest.raises(ToolchainError, match=r"waited 0\.\d s for a free row.* 0\.05 s") as caught:
            engine.submit("abc", SHORT, quiet).result(30)
        assert caught.value.code == "TC-512"
        assert engine.load_now().waiting == 0


def test_the_timeout_of_a_request_ends_it_running_or_waiting(tiny: Tiny) -> None:
    with busy(tiny("llama")) as (engine, running):
        waiting = engine.submit("abc", SHORT, quiet, timeout_s=0.05)
        with pytest.raises(ToolchainError, match=r"timeout of 0\.05 s \(0 tokens") as caught:
            waiting.result(30)
        assert caught.value.code == "TC-513"
        running.cancel()
        errors: list[ToolchainError] = []
        slow = engine.submit(
            "abc", LONG, lambda chunk: time.sleep(0.02), on_error=errors.append, timeout_s=0.2
        )
        with pytest.raises(ToolchainError, match=r"timeout of 0\.2 s \([1-9]\d* tokens") as caught:
            slow.result(30)
        assert errors == [caught.value]
        assert len(engine.submit("abc", SHORT, quiet, timeout_s=60).result(30).token_ids) == 2


@pytest.mark.parametrize(
    "limits", [{"max_waiting": -1}, {"max_waiting_tokens": -5}, {"max_queue_s": float("nan")}]
)
def test_impossible_limits_are_named(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(limits))) as caught:
        QueueLimits(**limits)
    assert caught.value.code == "TC-509"


def test_an_answer_that_does_not_fit_is_refused_with_the_numbers(tiny: Tiny) -> None:
    with LocalEngine.load(tiny("llama"), device="cpu", max_seq_len=100) as engine:
        said = "max_tokens 91 and the 10 tokens of the prompt exceed max_seq_len 100"
        with pytest.raises(UsageError, match=said) as caught:
            engine.generate("x" * 10, SamplingParams(max_tokens=91))
        assert caught.value.code == "TC-503" and "max_tokens <= 90" in caught.value.hint
        assert len(engine.generate("x" * 10, SamplingParams(max_tokens=90, ignore_eos=True)).token_ids) == 90
        # Without max_tokens: 64, or what is left.
        assert len(engine.generate("x" * 10, SamplingParams(ignore_eos=True)).token_ids) == 64
        assert len(engine.generate("x" * 80, SamplingParams(ignore_eos=True)).token_ids) == 20


def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalEngine.load(tiny("llama"), device="cpu") as engine:
        most = engine.encoder.max_bytes
        # At the limit it is tokenized, and its tokens are counted.
        with pytest.raises(UsageError, match=f"the prompt has {most} tokens, max_seq_len is 512"):
            engine.generate("x" * most, SHORT)

        def not_called(*arguments: object, **options: object) -> None:
            raise AssertionError("the tokenizer was asked")

        monkeypatch.setattr(type(engine.tokenizer), "__call__", not_called)
        for text in ("x" * (most + 1), "漢" * (most // 3 + 1), "y" * 10_000_000):
            with pytest.raises(UsageError, match=r"the prompt has \d+ bytes; max_seq_len is 512") as caught:
                engine.generate(text, SHORT)
            assert caught.value.code == "TC-503"


def test_text_that_is_no_unicode_is_refused(tiny: Tiny) -> None:
    with LocalEngine.load(tiny("llama"), device="cpu") as engine:
        with pytest.raises(UsageError, match="not valid Unicode") as caught:
            engine.generate("a\ud800b", SHORT)
        assert caught.value.code == "TC-503"


def test_a_long_text_gets_the_same_tokens_and_does_not_hold_up_short_ones(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    encoder = Encoder(tokenizer, 8192)
    text = "né 漢字 " * (LONG_BYTES // 10)
    assert LONG_BYTES < len(text.encode()) < encoder.max_bytes
    assert encoder.encode(text) == tokenizer(text)["input_ids"]
    # Held in the long one's tokenizer, others go on.
    held, release = threading.Event(), threading.Event()
    real = type(tokenizer).__call__

    def slow(self: Any, prompt: str, **options: Any) -> Any:
        if len(prompt) > 1000:
            held.set()
            assert release.wait(30)
        return real(self, prompt, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", slow)
    thread = threading.Thread(target=encoder.encode, args=(text,))
    thread.start()
    assert held.wait(30)
    assert encoder.encode("abc") == real(tokenizer, "abc")["input_ids"]
    release.set()
    thread.join()
