"""Detokenization, stop strings and sampling against tokenizers, plain Python and transformers' logits
processors."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.runtime.detokenize import Detokenizer, special_ids
from toolchain.runtime.stops import StopFilter
from toolchain.runtime.types import SamplingParams


@cache
def byte_level() -> Any:
    """Byte-level BPE with some merges, as GPT-2, Qwen and Llama 3 have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat said: 漢字 naïve 🙂🙂 the the cat"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def byte_fallback() -> Any:
    """SentencePiece style with byte fallback, as Llama 2 and Mixtral have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnop",
        "é",
        "▁a",
    ]
    merges = [("▁", "a")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, special_ids(tokenizer))
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_pieces_add_up_to_the_decoded_whole_and_never_break_a_character(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 319), max_size=60))
def test_any_tokens_of_a_byte_level_vocabulary_decode_as_a_whole_would(ids: list[int]) -> None:
    tokenizer = byte_level()
    ids = [token % len(tokenizer) for token in ids]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_is_not_held_back_for_longer_than_a_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a漢b", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, special_ids(tokenizer))
    seen = ""
    for token in ids:
        seen += detokenizer.push(token)
    assert seen == "a漢b"


def first_stop(text: str, stops: list[str]) -> str | None:
    """Independent statement of the rule: read character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(len(stop) for stop in whole)]
    return None


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab c", max_size=4), max_size=20),
    stops=st.lists(st.text(alphabet="ab c", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_the_text_at_the_first_one_completed(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    stop_filter = StopFilter(stops)
    emitted = ""
    for piece in pieces:
        emitted += stop_filter.push(piece)
        assert stop_filter.matched or not any(stop in emitted for stop in stops)
    emitted += stop_filter.flush()
    expected = first_stop(text, stops)
    assert (stop_filter.matched is not None) == (expected is not None)
    if expected is not None:
        assert stop_filter.matched in stops
        assert text.startswith(expected + str(stop_filter.matched))
    assert emitted == (text if expected is None else expected)


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 1},
    ],
)
def test_sampling_follows_the_distribution_of_transformers(
    settings_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feed the sampler an even grid of numbers instead of random ones: frequencies are then the
    distribution."""
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from toolchain.runtime import sampling

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings_["temperature"])])
    if "top_k" in settings_:
        warpers.append(TopKLogitsWarper(settings_["top_k"]))
    if "top_p" in settings_:
        warpers.append(TopPLogitsWarper(settings_["top_p"]))
    expected = torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.long), logits), dim=-1)[0]
    count = 4000
    numbers = iter((index + 0.5) / count for index in range(count))
    monkeypatch.setattr(sampling.Sampler, "uniform", lambda self: next(numbers))
    samplers = [sampling.Sampler(SamplingParams(**settings_))] * count
    chosen = torch.tensor(sampling.choose(logits.expand(count, -1), samplers))
    frequencies = torch.bincount(chosen, minlength=40) / count
    torch.testing.assert_close(frequencies, expected, atol=1.5 / count, rtol=0)
    assert set(chosen.tolist()) <= set(expected.nonzero()[:, 0].tolist())


def test_greedy_ties_go_to_the_lowest_id() -> None:
    import torch

    from toolchain.runtime.sampling import Sampler, choose

    assert choose(torch.tensor([[0.0, 2.0, 2.0]]), [Sampler(SamplingParams())]) == [1]
