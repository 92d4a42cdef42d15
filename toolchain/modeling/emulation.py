"""Which roundings of the target a loaded model computes: switched between two forwards, without loading it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

ATTRIBUTE = "toolchain_emulation"
"""Of a model from ``load_checkpoint``; other models round nothing."""


@dataclass
class Emulation:
    """Shared by the hooks of one model, which look at it in every forward."""

    activations: bool = True
    """Inputs of quantized Linears are rounded as the target's kernels would."""
    kv_cache: bool = True
    """Keys and values are rounded as the quantized cache would store them."""
    rounds_activations: bool = False
    """Whether the checkpoint has a Linear whose input is rounded at all: weight-only formats have none."""
    rounds_kv_cache: bool = False
    """Whether the checkpoint was made for a quantized KV cache."""


def emulation_of(model: Any) -> Emulation:
    """The switches of ``model``; for one that was not loaded from a quantized checkpoint, switches of nothing."""
    return getattr(model, ATTRIBUTE, None) or Emulation()


@contextmanager
def emulating(model: Any, *, activations: bool, kv_cache: bool) -> Iterator[None]:
    """Round only what is asked for. Channel scales (AWQ, SmoothQuant) are mathematics of the checkpoint and stay."""
    switches = emulation_of(model)
    before = switches.activations, switches.kv_cache
    switches.activations, switches.kv_cache = activations, kv_cache
    try:
        yield
    finally:
        switches.activations, switches.kv_cache = before
