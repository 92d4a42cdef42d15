"""A causal language model that computes nothing: every step takes ``pace_s`` and chooses the same token; reading
prompts takes ``prefill_s``.

What remains of the time of an answer is the cost of everything around a model: scheduler, sampling, text, and, when
it is served, engine process, Triton and client.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

TOKEN_TEXT = "x"


class NoOpModel(nn.Module):
    """Takes what the runtime gives a causal LM of transformers; keeps one key and value per position."""

    def __init__(self, vocab_size: int, token_id: int, pace_s: float, prefill_s: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.config.get_text_config = lambda: self.config
        self.pace_s, self.prefill_s = pace_s, prefill_s
        self._logits = torch.zeros(vocab_size)
        self._logits[token_id] = 1.0

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Any:
        time.sleep(self.pace_s if input_ids.shape[1] == 1 else self.prefill_s)
        cache = past_key_values if past_key_values is not None else DynamicCache()
        nothing = torch.zeros(input_ids.shape[0], 1, input_ids.shape[1], 1)
        cache.update(nothing, nothing, 0)
        logits = self._logits.expand(input_ids.shape[0], 1, -1)
        return SimpleNamespace(logits=logits, past_key_values=cache)


def noop_engine(
    engine_dir: str, pace_s: float, max_batch_size: int, *, prefill_s: float | None = None
) -> Any:
    """A LocalEngine around the model, with the tokenizer of ``engine_dir``. ``prefill_s``: default ``pace_s``."""
    from toolchain.data.tokenizer import load_tokenizer
    from toolchain.runtime.engine import LocalEngine
    from toolchain.runtime.location import Limits, locate

    tokenizer = load_tokenizer(locate(engine_dir).checkpoint)
    (token_id,) = tokenizer.encode(TOKEN_TEXT, add_special_tokens=False)
    return LocalEngine(
        NoOpModel(len(tokenizer), token_id, pace_s, pace_s if prefill_s is None else prefill_s),
        tokenizer,
        device=torch.device("cpu"),
        limits=Limits(max_batch_size=max_batch_size, max_seq_len=8192),
        name="noop",
    )
