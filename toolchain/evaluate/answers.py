"""Greedy answers of both models side by side, and the first token at which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.data.texts import JSONL_SUFFIXES, Sample, read_texts
from toolchain.runtime.types import SamplingParams

PROMPTS = 4
"""Taken from the evaluated text when no prompts are given."""
PROMPT_TOKENS = 32
ANSWER_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Prompt:
    text: str
    ids: tuple[int, ...]
    """With BOS, where the tokenizer puts one before every text."""


def given_prompts(tokenizer: Any, prompts: Path | Sequence[str], most: int | None) -> list[Prompt]:
    """The first ``most`` prompts of a sequence or a file: one per line, or JSONL with ``text`` or ``messages``.

    Conversations go through the chat template and end with the generation prompt. UsageError TC-528 for none.
    """
    samples: list[Sample] = list(_read(prompts) if isinstance(prompts, Path) else prompts)
    found = [_prompt(tokenizer, sample) for sample in samples[:most]]
    if not samples or any(not prompt.ids for prompt in found):
        raise UsageError(
            f"{prompts if isinstance(prompts, Path) else 'the list of prompts'} holds "
            f"{'an empty prompt' if samples else 'no prompt'}",
            hint="one prompt per line, or JSONL with `text` or `messages`",
            code="TC-528",
        )
    return found


def _read(path: Path) -> list[Sample]:
    found = list(read_texts(path))
    if path.suffix in JSONL_SUFFIXES or path.is_dir():
        return found
    return [line for text in found for line in str(text).splitlines() if line.strip()]


def _prompt(tokenizer: Any, sample: Sample) -> Prompt:
    if isinstance(sample, str):
        return Prompt(text=sample, ids=tuple(tokenizer(sample)["input_ids"]))
    if not tokenizer.chat_template:
        raise UsageError(
            "the prompts hold conversations, but the tokenizer has no chat template",
            hint='give prompts with "text"',
            code="TC-521",
        )
    text = tokenizer.apply_chat_template(sample, tokenize=False, add_generation_prompt=True)
    return Prompt(text=text, ids=tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def held_out_prompts(
    tokenizer: Any, tokens: Sequence[int], *, window: int, bos: int | None, count: int
) -> list[Prompt]:
    """The beginnings, ``PROMPT_TOKENS`` long, of ``count`` windows spread evenly over the evaluated tokens."""
    length, last = min(PROMPT_TOKENS, window, len(tokens)), max(0, len(tokens) // window - 1)
    windows = [index * last // max(1, count - 1) for index in range(count)]
    found = []
    for start in sorted({index * window for index in windows}):
        ids = list(tokens[start : start + length])
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        found.append(Prompt(text=text, ids=tuple(ids if bos is None else [bos, *ids])))
    return found


def generate(checkpoint: Path, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Greedy token ids, the end token included, of each prompt alone: in a crowd rounding may tip a choice.

    ``model``: of ``checkpoint``, loaded. UsageError TC-503 for a prompt that leaves no room for an answer.
    """
    from toolchain.runtime.engine import LocalEngine
    from toolchain.runtime.location import locate, resolve_limits
    from toolchain.runtime.model import end_ids

    config = model.config.get_text_config()
    limits = resolve_limits(locate(checkpoint), config.to_dict(), max_batch_size=1, max_seq_len=None)
    ends = end_ids(checkpoint, config, tokenizer)
    with LocalEngine(model, tokenizer, device=model.device, limits=limits, end_ids=ends) as engine:
        answers = []
        for prompt in prompts:
            room = max(1, limits.max_seq_len - len(prompt.ids))
            params = SamplingParams(max_tokens=min(ANSWER_TOKENS, room))
            answers.append(list(engine.generate(prompt.ids, params).token_ids))
        return answers


def side_by_side(
    tokenizer: Any, prompts: Sequence[Prompt], mine: Sequence[list[int]], theirs: Sequence[list[int]] | None
) -> list[dict[str, Any]]:
    """One entry per prompt; ``theirs`` (of the baseline) None: nothing to compare with."""
    found = []
    for index, prompt in enumerate(prompts):
        reference = theirs[index] if theirs else None
        found.append(
            {
                "prompt": prompt.text,
                "baseline": None if reference is None else tokenizer.decode(reference),
                "quantized": tokenizer.decode(mine[index]),
                "tokens": max(len(mine[index]), len(reference or ())),
                "first_difference": None if reference is None else first_difference(mine[index], reference),
            }
        )
    return found


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that differs; the length of the shorter where one only goes on; None for equal."""
    for index, (one, other) in enumerate(zip(mine, theirs, strict=False)):
        if one != other:
            return index
    return None if len(mine) == len(theirs) else min(len(mine), len(theirs))
