"""What an answer says beside its text: why it ended, when its tokens came, what each token stands for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_runtime_text import KINDS
from toolchain.runtime.detokenize import Detokenizer, special_ids
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.token_text import TokenText
from toolchain.runtime.types import Chunk, SamplingParams

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Iterator[LocalEngine]:
    import torch

    with LocalEngine.load(tiny("qwen3_moe"), device="cpu", dtype=torch.float32, max_batch_size=4) as made:
        yield made


def test_the_reason_of_the_end_is_named(engine: LocalEngine) -> None:
    params = {"max_tokens": 60, "temperature": 1.0, "seed": 11}
    free = engine.generate("The", SamplingParams(**params, ignore_eos=True))
    assert (free.finish_reason, free.stop_reason) == ("length", None)
    stop = free.text[20:24]
    stopped = engine.generate("The", SamplingParams(**params, ignore_eos=True, stop=("never said", stop)))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    end = free.token_ids[5]
    engine.end_ids = frozenset({end})
    try:
        ended = engine.generate("The", SamplingParams(**params))
    finally:
        engine.end_ids = frozenset({1})
    assert (ended.finish_reason, ended.stop_reason) == ("stop", end)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    stops=st.lists(st.text(alphabet="aeit \n", min_size=1, max_size=2), max_size=2),
    echo=st.booleans(),
    ignore_eos=st.booleans(),
)
def test_an_answer_in_one_chunk_says_the_same_as_a_streamed_one(
    engine: LocalEngine, seed: int, stops: list[str], echo: bool, ignore_eos: bool
) -> None:
    params = SamplingParams(
        max_tokens=24, temperature=1.0, seed=seed, stop=tuple(stops), exclude_input_from_output=not echo,
        ignore_eos=ignore_eos, logprobs=1,
    )  # fmt: skip
    whole: list[Chunk] = []
    pieces: list[Chunk] = []
    one = engine.submit("né 漢", params, whole.append, streaming=False)
    other = engine.submit("né 漢", params, pieces.append)
    assert one.result(30).token_ids == other.result(30).token_ids
    (chunk,) = whole
    assert chunk.text == "".join(piece.text for piece in pieces) == one.result().text
    assert chunk.token_ids == tuple(token for piece in pieces for token in piece.token_ids)
    assert [item.token_id for item in chunk.logprobs] == list(chunk.token_ids)
    assert chunk.cumulative_logprob == pytest.approx(pieces[-1].cumulative_logprob, abs=1e-4)
    assert (chunk.finish_reason, chunk.stop_reason) == (pieces[-1].finish_reason, pieces[-1].stop_reason)


def test_a_cancelled_answer_in_one_chunk_keeps_what_there_was(engine: LocalEngine) -> None:
    seen: list[Chunk] = []
    handle = engine.submit(
        "abc", SamplingParams(max_tokens=400, ignore_eos=True), seen.append, streaming=False
    )
    time.sleep(0.1)
    handle.cancel()
    answer = handle.result(30)
    assert answer.finish_reason == "cancelled"
    assert answer.text == engine.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert [chunk.finish_reason for chunk in seen] == ["cancelled"]


def test_times_are_in_order_and_of_this_request(engine: LocalEngine) -> None:
    before = time.time_ns()
    *first, last = engine.stream("abc", SamplingParams(max_tokens=8, ignore_eos=True))
    after = time.time_ns()
    assert all(chunk.times is None for chunk in first)
    assert last.times is not None
    times = last.times
    moments = [times.arrival_ns, times.first_scheduled_ns, times.first_token_ns, times.last_token_ns]
    assert [before, *moments, after] == sorted([before, *moments, after])
    assert times.first_token_ns < times.last_token_ns


def test_special_tokens_are_added_unless_the_sender_has_its_own(tiny: Tiny, tmp_path: Path) -> None:
    """A tokenizer that begins texts with <s>, as Llama's does."""
    import json
    import shutil

    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory)
    state = json.loads((directory / "tokenizer.json").read_text())
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(state))
    with LocalEngine.load(directory, device="cpu") as engine:
        plain = engine.encode("abc", add_special_tokens=False)
        assert engine.encode("abc") == [0, *plain]
        with_bos = engine.generate("abc", SamplingParams(max_tokens=6))
        assert with_bos.prompt_tokens == 4
        assert with_bos == engine.generate([0, *plain], SamplingParams(max_tokens=6))
        own = engine.generate("abc", SamplingParams(max_tokens=6, add_special_tokens=False))
        assert own == engine.generate(plain, SamplingParams(max_tokens=6))


@cache
def token_text(kind: str) -> tuple[Any, TokenText]:
    tokenizer = KINDS[kind]()
    return tokenizer, TokenText(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(kind: str, text: str) -> None:
    tokenizer, tokens = token_text(kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = bytes(byte for token in ids for byte in tokens.utf8(token))
    # The vocabulary of SentencePiece's kind puts a space before a text that has none, and takes it off again.
    expected = tokenizer.decode(ids, skip_special_tokens=True).encode()
    assert joined.removeprefix(b" " if kind == "byte_fallback" else b"") == expected
    assert all(tokens.text(token) == bytes(tokens.utf8(token)).decode(errors="replace") for token in ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30), at=st.integers(0, 30))
def test_tokens_that_nobody_waits_for_are_decoded_together(kind: str, text: str, at: int) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    one_by_one = Detokenizer(tokenizer, special_ids(tokenizer))
    together = Detokenizer(tokenizer, special_ids(tokenizer))
    expected = "".join([*(one_by_one.push(token) for token in ids), one_by_one.flush()])
    together.extend(ids[:at])
    together.extend(ids[at:])
    assert together.flush() == expected
