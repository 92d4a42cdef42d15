"""The local engine against transformers' own generate, alone and in a crowd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.location import Limits
from toolchain.runtime.types import SamplingParams

PROMPTS = (
    "def main():\n",
    "x",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "import os\nimport sys",
    "né 漢字 ",
)
FAMILIES = (
    "qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text",
    "minimax", "llama", "mistral",
)  # fmt: skip
PLAIN = ("gpt_oss", "llama4_text")
Tiny = Callable[[str], Path]


def reference(directory: Path, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """What transformers generates for each prompt alone, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    answers = []
    for ids in prompts:
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=max_new_tokens)
        answers.append(output[0, len(ids) :].tolist())
    return answers


def load(directory: Path, **options: Any) -> LocalEngine:
    import torch

    return LocalEngine.load(directory, device="cpu", dtype=torch.float32, **options)


def load_plain(directory: Path) -> LocalEngine:
    """An engine around the model of transformers, for architectures that the checkpoint loader refuses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    return LocalEngine(
        model,
        AutoTokenizer.from_pretrained(directory),
        device=torch.device("cpu"),
        limits=Limits(max_batch_size=3, max_seq_len=512),
        end_ids=frozenset({1}),
    )


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Iterator[LocalEngine]:
    with load(tiny("qwen3_moe"), max_batch_size=4) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_alone_and_in_a_crowd(tiny: Tiny, family: str) -> None:
    directory = tiny(family)
    with load_plain(directory) if family in PLAIN else load(directory, max_batch_size=3) as engine:
        ids = [engine.encode(prompt) for prompt in PROMPTS]
        expected = reference(directory, ids, 24)
        params = SamplingParams(max_tokens=24)
        alone = [list(engine.generate(prompt, params).token_ids) for prompt in PROMPTS[:2]]
        # Five requests for three rows, of different lengths: they join and leave a running batch.
        handles = [engine.submit(prompt, params, lambda chunk: None) for prompt in PROMPTS]
        crowded = [list(handle.result().token_ids) for handle in handles]
        # And with prompts that are read piece by piece while others are being answered.
        engine._scheduler._runner.prefill_tokens = 20
        handles = [engine.submit(prompt, params, lambda chunk: None) for prompt in PROMPTS]
        in_pieces = [list(handle.result().token_ids) for handle in handles]
    assert alone == expected[:2]
    assert crowded == expected
    assert in_pieces == expected


def test_staggered_requests_join_a_running_batch(engine: LocalEngine, tiny: Tiny) -> None:
    import threading

    ids = [engine.encode(prompt) for prompt in PROMPTS[:3]]
    expected = reference(tiny("qwen3_moe"), ids, 30)
    joined = threading.Event()
    first = engine.submit(PROMPTS[0], SamplingParams(max_tokens=30), lambda chunk: joined.set())
    joined.wait(30)
    others = [
        engine.submit(prompt, SamplingParams(max_tokens=30), lambda chunk: None) for prompt in PROMPTS[1:3]
    ]
    assert [list(handle.result().token_ids) for handle in (first, *others)] == expected


def test_streamed_chunks_add_up_to_the_completion(engine: LocalEngine) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    chunks = list(engine.stream(PROMPTS[0], params))
    whole = engine.generate(PROMPTS[0], params)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason == "length"
    assert len(whole.token_ids) == 40
    assert {chunk.prompt_tokens for chunk in chunks} == {len(engine.encode(PROMPTS[0]))}
    assert whole.text == engine.tokenizer.decode(whole.token_ids, skip_special_tokens=True)


def test_seeded_sampling_does_not_depend_on_the_batch(engine: LocalEngine) -> None:
    params = [
        SamplingParams(max_tokens=16, temperature=0.8, top_k=20, top_p=0.9, seed=seed) for seed in range(4)
    ]
    alone = [engine.generate("abc", item).token_ids for item in params]
    handles = [engine.submit("abc", item, lambda chunk: None) for item in params]
    assert [handle.result().token_ids for handle in handles] == alone
    assert len(set(alone)) > 1


def test_all_end_ids_of_the_generation_config_end_an_answer(tiny: Tiny, tmp_path: Path) -> None:
    import json
    import shutil

    directory = tmp_path / "model"
    shutil.copytree(tiny("llama"), directory)
    with load(directory) as engine:
        free = engine.generate("hello", SamplingParams(max_tokens=12, ignore_eos=True))
    third = free.token_ids[2]
    assert third not in free.token_ids[:2]
    file = directory / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [1, third]}))
    expected = reference(directory, [engine.encode("hello")], 12)[0]
    with load(directory) as engine:
        ended = engine.generate("hello", SamplingParams(max_tokens=12))
        ignored = engine.generate("hello", SamplingParams(max_tokens=12, ignore_eos=True))
    assert list(ended.token_ids) == expected == list(free.token_ids[:3])
    assert ended.finish_reason == "stop"
    assert ended.text == engine.tokenizer.decode(free.token_ids[:2], skip_special_tokens=True)
    assert ignored == free


def test_a_stop_string_ends_the_answer_before_it(engine: LocalEngine) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=11, ignore_eos=True)
    free = engine.generate("The", params).text
    stop = free[20:24]
    seen: list[str] = []
    handle = engine.submit(
        "The",
        SamplingParams(max_tokens=60, temperature=1.0, seed=11, ignore_eos=True, stop=(stop, "never said")),
        lambda chunk: seen.append(chunk.text),
    )
    completion = handle.result()
    assert completion.finish_reason == "stop"
    assert "".join(seen) == completion.text == free[: free.index(stop)]
    assert len(completion.token_ids) < 60


def test_the_prompt_is_part_of_the_answer_when_asked(engine: LocalEngine) -> None:
    params = {"max_tokens": 8, "ignore_eos": True}
    answer = engine.generate("né 漢", SamplingParams(**params))
    echoed = list(engine.stream("né 漢", SamplingParams(**params, exclude_input_from_output=False)))
    assert "".join(chunk.text for chunk in echoed) == "né 漢" + answer.text
    assert echoed[0].text.startswith("né 漢")


def test_max_seq_len_ends_an_answer(tiny: Tiny) -> None:
    with load(tiny("llama"), max_seq_len=10) as engine:
        completion = engine.generate("abcdefg", SamplingParams(ignore_eos=True))
    assert (completion.prompt_tokens, len(completion.token_ids), completion.finish_reason) == (7, 3, "length")


def test_chat_template_gives_the_tokens_of_transformers(engine: LocalEngine) -> None:
    messages = [{"role": "user", "content": "hi"}]
    expected = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert engine.apply_chat_template(messages) == expected["input_ids"]


def test_forward_logits_equal_the_model_while_it_generates(engine: LocalEngine, tiny: Tiny) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny("qwen3_moe"), dtype=torch.float32, experts_implementation="eager"
    ).eval()
    ids = torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(0))
    handle = engine.submit("abc", SamplingParams(max_tokens=40, ignore_eos=True), lambda chunk: None)
    with torch.no_grad():
        torch.testing.assert_close(engine.forward_logits(ids), model(ids).logits)
    assert len(handle.result().token_ids) == 40


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.booleans()), min_size=1, max_size=12)
)
def test_any_mix_of_lengths_and_cancellations_leaves_the_others_alone(
    engine: LocalEngine, plan: list[tuple[int, int, bool]]
) -> None:
    """Each request: prompt length, answer length, and whether it is cancelled after its first token."""
    text = "def f(a, b):\n    return [x for x in range(a) if x % b]\n\n\n"
    whole = {
        key: engine.generate(text[: key[0]], answer(key[1])).token_ids for key in {item[:2] for item in plan}
    }
    handles = []
    for length, tokens, cancelled in plan:
        handle = engine.submit(text[:length], answer(tokens), lambda chunk: None)
        if cancelled:
            handle.cancel()
        handles.append(handle)
    for (length, tokens, cancelled), handle in zip(plan, handles, strict=True):
        completion = handle.result(60)
        expected = whole[length, tokens]
        if cancelled and completion.finish_reason == "cancelled":
            expected = expected[: len(completion.token_ids)]
        assert completion.token_ids == expected


def answer(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True)
