"""Whether and how a model decodes over pages: decided once, when it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from toolchain.core.errors import ToolchainError
from toolchain.kernels.decoding import PAGE
from toolchain.modeling.experts import UnfusedExperts
from toolchain.modeling.packed.experts import FusedExperts
from toolchain.modeling.packed.loading import KV_SCALES
from toolchain.runtime.paged.attention import NotPaged, attend_as_before, attend_in_pages
from toolchain.runtime.paged.decoder import Decoder
from toolchain.runtime.paged.pages import KvPages, LayerShape, shapes_of
from toolchain.runtime.paged.pool import PagePool

KEPT_FREE = 0.1
"""Share of a GPU's memory that is left to activations and graphs."""


@dataclass(frozen=True, kw_only=True)
class Paging:
    """What is wished for."""

    max_batch_size: int
    max_seq_len: int
    in_fp8: bool = False
    static: bool = False
    """Every request holds pages for ``max_seq_len`` positions."""
    planned: bool = True
    """Whether ``max_seq_len`` was planned for; the model's own is lowered to what fits into memory."""
    memory_bytes: int | None = None
    """Most bytes of pages; None: what the GPU has free, but for a tenth of all that it has; no limit on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Paged:
    """What a model decodes with."""

    pool: PagePool
    pages: KvPages
    decoder: Decoder
    notes: tuple[str, ...]


def set_up(model: Any, cache: Any, wish: Paging, *, device: torch.device, options: dict[str, Any]) -> Paged:
    """``cache``: of a forward over one token. NotPaged, with the model as before, where it cannot be.

    ToolchainError TC-517 when not even one request of the longest kind fits into memory.
    """
    shapes = shapes_of(cache)
    dtype = cache.layers[0].keys.dtype
    attend_in_pages(model)
    try:
        pool = _pool(shapes, wish, device, (1 if wish.in_fp8 else dtype.itemsize, dtype.itemsize))
        pages = KvPages(shapes, pool, device=device, dtype=dtype, in_fp8=wish.in_fp8, scales=_scales(model))
        host_decides = any(
            isinstance(module, UnfusedExperts) and not isinstance(module, FusedExperts)
            for module in model.modules()
        )
        decoder = Decoder(
            model,
            pages,
            device=device,
            max_rows=wish.max_batch_size,
            graphs=device.type == "cuda" and not host_decides,
            options=options,
        )
        # A step of a row that nobody owns: whether attention can read pages is known after it.
        with torch.inference_mode():
            why = decoder.try_out()
    except (NotPaged, ToolchainError):
        attend_as_before(model)
        raise
    except Exception as error:
        attend_as_before(model)
        raise NotPaged(f"a first step failed, {type(error).__name__}: {error}") from error
    if host_decides and device.type == "cuda":
        why = "some experts are not fused"
    notes = [f"decoding is not captured in CUDA graphs: {why}"] if why else []
    if pool.longest < wish.max_seq_len:
        notes.append(
            f"requests end at {pool.longest} positions of {wish.max_seq_len}: there is no memory for a longer KV cache"
        )
    return Paged(pool=pool, pages=pages, decoder=decoder, notes=tuple(notes))


def _pool(
    shapes: list[LayerShape], wish: Paging, device: torch.device, item_bytes: tuple[int, int]
) -> PagePool:
    """``item_bytes``: of an element in pages, and of one in the model's dtype."""
    elements = sum(shape.elements for shape in shapes) * PAGE
    each, unpaged = (elements * size for size in item_bytes)
    longest, per_request = wish.max_seq_len, -(-wish.max_seq_len // PAGE)
    wanted = per_request * wish.max_batch_size
    room = wish.memory_bytes
    if room is None and device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        room = int(free - KEPT_FREE * total)
    fitting = wanted
    if room is not None:
        # A prompt is read into a cache of its own, in the model's dtype, before it goes into pages.
        fitting = min(wanted, (room - per_request * unpaged) // each - 1)
        if fitting < per_request and not wish.planned:
            fitting = room // (each + unpaged) - 1
            longest = fitting * PAGE
    if fitting < 1 or (fitting < per_request and wish.planned):
        raise ToolchainError(
            f"the KV cache of one request of {wish.max_seq_len} positions takes "
            f"{per_request * (each + unpaged) / 2**20:.0f} MiB, {max(0, room or 0) / 2**20:.0f} MiB are free for it",
            hint="plan the engine with a lower --max-seq-len, or take --kv-cache fp8",
            code="TC-517",
        )
    return PagePool(
        slots=wish.max_batch_size, pages=fitting, page_size=PAGE, longest=longest, static=wish.static
    )


def _scales(model: Any) -> dict[int, tuple[float, float]]:
    """Layer -> scales of keys and values that the checkpoint stores."""
    stored = getattr(model, KV_SCALES, None) or {}
    return {
        model.get_submodule(path).layer_idx: (pair.get("k_scale", 1.0), pair.get("v_scale", 1.0))
        for path, pair in stored.items()
    }
