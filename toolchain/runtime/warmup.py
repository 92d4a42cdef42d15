"""Real inferences before an engine is said to be ready: the first requests of users shall not pay for first times
(kernels that are compiled, memory that is allocated, batches that are formed), nor find out that nothing works."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from toolchain.runtime.types import SamplingParams

if TYPE_CHECKING:
    from toolchain.runtime.engine import LocalEngine

PROMPT_TOKENS = (8, 128, 1024)
"""Lengths of the prompts, as far as they fit into half of max_seq_len."""
MAX_TOKENS = 4
SEED = 0


def warm_up(engine: LocalEngine, requests: int) -> int:
    """Run ``requests`` inferences of random tokens, in waves of 1, 2, 4... at once up to the batch size; how many ran.

    Raises the error of the first that fails.
    """
    tokens = random.Random(SEED)
    lengths = sorted({max(1, min(length, engine.limits.max_seq_len // 2)) for length in PROMPT_TOKENS})
    room = engine.limits.max_seq_len - lengths[-1]
    params = SamplingParams(max_tokens=max(1, min(MAX_TOKENS, room)), ignore_eos=True)
    ran, wave = 0, 1
    while ran < requests:
        size = min(wave, engine.limits.max_batch_size, requests - ran)
        prompts = [
            [tokens.randrange(engine.vocab_size) for _ in range(lengths[(ran + index) % len(lengths)])]
            for index in range(size)
        ]
        handles = [engine.submit(prompt, params, lambda chunk: None, streaming=False) for prompt in prompts]
        for handle in handles:
            handle.result()
        ran, wave = ran + size, wave * 2
    return ran
