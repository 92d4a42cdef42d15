"""In the checkpoint's own bfloat16: an answer does not depend on who else is in the batch.

Random weights give many nearly equal best tokens, so a single bit that the neighbours change shows in the text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_runtime_generate import FAMILIES, PLAIN
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.location import Limits
from toolchain.runtime.types import SamplingParams

PROMPTS = tuple(f"def f{n}(x):\n    return x * {n} + " + "y" * (n * 7 % 40) for n in range(12))
Tiny = Callable[[str], Path]


def load(directory: Path, family: str) -> LocalEngine:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if family not in PLAIN:
        return LocalEngine.load(directory, device="cpu", max_batch_size=8)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, experts_implementation="eager"
    )
    return LocalEngine(
        model.eval(),
        AutoTokenizer.from_pretrained(directory),
        device=torch.device("cpu"),
        limits=Limits(max_batch_size=8, max_seq_len=512),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_crowd_changes_no_bit(tiny: Tiny, family: str) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with load(tiny(family), family) as engine:
        alone = [engine.generate(prompt, params).token_ids for prompt in PROMPTS]
        handles = [engine.submit(prompt, params, lambda chunk: None) for prompt in PROMPTS]
        crowd = [handle.result().token_ids for handle in handles]
    assert crowd == alone


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "llama"])
def test_the_crowd_equals_transformers_alone(tiny: Tiny, family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(family), experts_implementation="eager").eval()
    assert model.dtype == torch.bfloat16
    with load(tiny(family), family) as engine:
        ids = [engine.encode(prompt) for prompt in PROMPTS]
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        handles = [engine.submit(prompt, params, lambda chunk: None) for prompt in ids]
        crowd = [list(handle.result().token_ids) for handle in handles]
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in ids:
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        expected.append(output[0, len(prompt) :].tolist())
    assert crowd == expected
