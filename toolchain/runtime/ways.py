"""How a checkpoint is run on a device: packed or decoded, over pages or not, and what is to be said about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.core.errors import UsageError
from toolchain.runtime.location import Limits

if TYPE_CHECKING:
    import torch

    from toolchain.runtime.paged.setup import Paging

KERNELS = ("auto", "off")
KV_CACHES = ("auto", "bf16", "fp8")
KV_LAYOUTS = ("paged", "static")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a user asks for. UsageError for words that are not known."""

    kernels: str = "auto"
    """``auto``: weights stay packed where the fused kernels can run; ``off``: they are decoded when they are loaded,
    and what the target's kernels round is emulated."""
    kv_cache: str = "auto"
    """On a GPU: ``auto`` is what the checkpoint was made for."""
    kv_layout: str = "paged"
    """On a GPU: ``static`` holds memory of max_seq_len positions for every request."""

    def __post_init__(self) -> None:
        known = (("kernels", KERNELS), ("kv_cache", KV_CACHES), ("kv_layout", KV_LAYOUTS))
        for name, words in known:
            if getattr(self, name) not in words:
                raise UsageError(
                    f"{name} {getattr(self, name)!r}; expected {', '.join(words[:-1])} or {words[-1]}",
                    code="TC-501",
                )


@dataclass(frozen=True, kw_only=True)
class Way:
    packed: bool
    paged: bool
    kv_in_fp8: bool
    notes: tuple[str, ...] = ()


def choose_way(
    checkpoint: Path, device: torch.device, dtype: torch.dtype | None, wish: Wish, *, emulate: bool
) -> Way:
    """``emulate``: False asks for a model that rounds no activations, which only decoded weights can give."""
    from toolchain.modeling.packed import NOT_QUANTIZED, why_not_packed, why_not_stored

    notes = []
    why = why_not_packed(checkpoint, device, dtype)
    asked = wish.kernels == "auto" and emulate
    if asked and why is not None and why_not_stored(checkpoint, dtype) != NOT_QUANTIZED:
        notes.append(f"the weights are decoded: {why}")
    stored = _stored_kv_cache(checkpoint)
    if wish.kv_cache == "auto" and stored not in (None, "FP8") and device.type == "cuda":
        notes.append(f"the KV cache is kept in BF16: there are no kernels for {stored}")
    if device.type != "cuda" and (wish.kv_cache, wish.kv_layout) != (Wish.kv_cache, Wish.kv_layout):
        notes.append(f"KV caches of --kv-cache and --kv-layout are those of GPUs: not heeded on {device}")
    return Way(
        packed=asked and why is None,
        paged=device.type == "cuda",
        kv_in_fp8=wish.kv_cache == "fp8" or (wish.kv_cache == "auto" and stored == "FP8"),
        notes=tuple(notes),
    )


def paging_of(way: Way, wish: Wish, limits: Limits, *, planned: bool) -> Paging | None:
    """What the runner is asked to set up. ``planned``: whether somebody has set the limits."""
    from toolchain.runtime.paged.setup import Paging

    if not way.paged:
        return None
    return Paging(
        max_batch_size=limits.max_batch_size,
        max_seq_len=limits.max_seq_len,
        in_fp8=way.kv_in_fp8,
        static=wish.kv_layout == "static",
        planned=planned,
    )


def _stored_kv_cache(checkpoint: Path) -> str | None:
    from toolchain.checkpoint.quant_config import read_quant_config
    from toolchain.checkpoint.source import QuantizedSource, open_source

    if isinstance(open_source(checkpoint), QuantizedSource):
        return None
    quant = read_quant_config(checkpoint)
    return quant.kv_cache_quant_algo if quant else None
