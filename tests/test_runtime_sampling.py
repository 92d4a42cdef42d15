"""Penalties and log probabilities against transformers' processors, its generate, and the definitions on raw logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.core.errors import UsageError
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.sampling import Sampler, choose
from toolchain.runtime.types import SamplingParams

Tiny = Callable[[str], Path]
PROMPTS = ("def main():\n", "x", "The quick brown fox jumps over the lazy dog. ", "né 漢字 ")
VOCABULARY = 12


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Iterator[LocalEngine]:
    import torch

    with LocalEngine.load(tiny("qwen3_moe"), device="cpu", dtype=torch.float32, max_batch_size=4) as made:
        yield made


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        tiny("qwen3_moe"), dtype=torch.float32, experts_implementation="eager"
    ).eval()


def test_repetition_penalty_gives_the_tokens_of_transformers(engine: LocalEngine, model: Any) -> None:
    """Alone and beside requests without and with another penalty."""
    import torch

    penalties = (1.3, 1.0, 0.8, 2.0)
    expected = []
    for prompt, penalty in zip(PROMPTS, penalties, strict=True):
        ids = torch.tensor([engine.encode(prompt)])
        output = model.generate(ids, do_sample=False, max_new_tokens=24, repetition_penalty=penalty)
        expected.append(output[0, ids.shape[1] :].tolist())
    params = [SamplingParams(max_tokens=24, repetition_penalty=penalty) for penalty in penalties]
    alone = [
        list(engine.generate(prompt, item).token_ids) for prompt, item in zip(PROMPTS, params, strict=True)
    ]
    handles = [
        engine.submit(prompt, item, lambda chunk: None) for prompt, item in zip(PROMPTS, params, strict=True)
    ]
    assert alone == expected
    assert [list(handle.result().token_ids) for handle in handles] == expected


def penalized(
    logits: list[float], prompt: list[int], answer: list[int], params: SamplingParams
) -> list[float]:
    """The definitions, token by token: repetition as in transformers, then OpenAI's frequency and presence."""
    corrected = []
    for token, value in enumerate(logits):
        if token in prompt or token in answer:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = answer.count(token)
        value -= params.frequency_penalty * count + (params.presence_penalty if count else 0.0)
        corrected.append(value)
    return corrected


ROW = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
        "frequency_penalty": st.sampled_from([0.0, 0.7, -1.0, 2.0]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.2, 3.0, 0.5]),
    }
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=4), seed=st.integers(0, 10_000))
def test_penalties_follow_their_definitions_in_any_batch(rows: list[dict[str, Any]], seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    params = [SamplingParams(**{key: row[key] for key in row if key != "prompt"}) for row in rows]
    samplers = [Sampler(item, row["prompt"]) for item, row in zip(params, rows, strict=True)]
    answers: list[list[int]] = [[] for _ in rows]
    for _ in range(8):
        logits = torch.randn(len(rows), VOCABULARY, generator=generator) * 2
        before = logits.clone()
        chosen = choose(logits, samplers)
        assert torch.equal(logits, before)
        for row, token in enumerate(chosen):
            values = penalized(logits[row].tolist(), rows[row]["prompt"], answers[row], params[row])
            assert values[token] == pytest.approx(max(values), abs=1e-5)
            answers[row].append(token)
            penalties = samplers[row].penalties
            if penalties is not None:
                penalties.add(token)


def test_what_a_request_asks_for_does_not_change_its_neighbours(engine: LocalEngine) -> None:
    base: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
    rows = [
        SamplingParams(**base),
        SamplingParams(**base, logprobs=3, presence_penalty=2.0),
        SamplingParams(**base, temperature=0.8, seed=4, frequency_penalty=1.0),
        SamplingParams(**base, temperature=1.2, top_k=9, seed=5, repetition_penalty=1.7, logprobs=0),
    ]
    alone = [engine.generate(prompt, item) for prompt, item in zip(PROMPTS, rows, strict=True)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        handles = [engine.submit(PROMPTS[index], rows[index], lambda chunk: None) for index in order]
        for index, handle in zip(order, handles, strict=True):
            assert handle.result().token_ids == alone[index].token_ids
    assert len({answer.token_ids for answer in alone}) == 4


def test_a_frequency_penalty_ends_a_repetition(engine: LocalEngine) -> None:
    """The random model repeats itself; each repetition costs two logits."""
    free = engine.generate("x", SamplingParams(max_tokens=40, ignore_eos=True)).token_ids
    varied = engine.generate(
        "x", SamplingParams(max_tokens=40, ignore_eos=True, frequency_penalty=2.0)
    ).token_ids
    assert len(set(varied)) > len(set(free))


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.9, "top_k": 12, "seed": 3, "repetition_penalty": 1.4, "presence_penalty": 1.0}],
)
def test_log_probabilities_are_those_of_the_models_own_distribution(
    engine: LocalEngine, model: Any, sampling: dict[str, Any]
) -> None:
    """Whatever the sampling makes of them: log_softmax of the logits of one forward over prompt and answer."""
    import torch

    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=5, **sampling)
    handles = [engine.submit(prompt, params, lambda chunk: None) for prompt in PROMPTS]
    handles.append(engine.submit(PROMPTS[0], SamplingParams(max_tokens=12), lambda chunk: None))
    for prompt, handle in zip(PROMPTS, handles, strict=False):
        answer = handle.result()
        ids = engine.encode(prompt)
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *answer.token_ids]])).logits[0, len(ids) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1)
        own = expected.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        found = torch.tensor([item.logprob for item in answer.logprobs])
        torch.testing.assert_close(found, own, atol=2e-4, rtol=1e-4)
        assert [item.token_id for item in answer.logprobs] == list(answer.token_ids)
        assert answer.cumulative_logprob == pytest.approx(own.sum().item(), abs=1e-3)
        for item, row in zip(answer.logprobs, expected, strict=True):
            best = row.topk(5)
            torch.testing.assert_close(
                torch.tensor([value for _, value in item.top]), best.values, atol=2e-4, rtol=1e-4
            )
            assert {token for token, _ in item.top} == set(best.indices.tolist())
    assert handles[-1].result().logprobs == ()
    assert handles[-1].result().cumulative_logprob is None


def test_every_chunk_has_the_log_probabilities_of_its_tokens(engine: LocalEngine) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, seed=5, logprobs=0)
    chunks = list(engine.stream("né", params))
    assert all([item.token_id for item in chunk.logprobs] == list(chunk.token_ids) for chunk in chunks)
    assert all(item.top == () for chunk in chunks for item in chunk.logprobs)
    total = math.fsum(item.logprob for chunk in chunks for item in chunk.logprobs)
    assert chunks[-1].cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty 2.1"),
        ({"presence_penalty": float("nan")}, "presence_penalty nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty inf"),
        ({"logprobs": 21}, "logprobs 21"),
        ({"logprobs": -1}, "logprobs -1"),
        ({"stop": ("a",) * 65}, "65 stop strings"),
        ({"stop": ("a" * 4097,)}, "a stop string of 4097 characters"),
        ({"stop": ("a", "")}, "an empty stop string"),
        ({"max_tokens": 0}, "max_tokens 0"),
    ],
)
def test_parameters_out_of_range_are_named(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        SamplingParams(**given_)
    assert caught.value.code == "TC-501"
