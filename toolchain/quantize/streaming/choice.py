"""Which way a plan is quantized: the whole model in memory, or streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from toolchain.core.errors import UsageError
from toolchain.core.files import GIB
from toolchain.core.progress import Progress
from toolchain.formats import get_format
from toolchain.plan import sparsity
from toolchain.plan.streaming import data_reasons
from toolchain.plan.types import Plan
from toolchain.recipes import get_recipe

MEMORY_SHARE = 0.8
"""Of the memory that is free: a plan that takes more is streamed where that is possible."""


Way = Literal["memory", "data-free", "layers"]


def choose_way(plan: Plan, wish: bool | None, progress: Progress) -> Way:
    """How ``plan`` is quantized: the whole model in ``memory``, or streamed tensor by tensor (``data-free``) or decoder
    layer by decoder layer (``layers``). ``wish``: what the user said; None: by the plan's estimate of memory."""
    if sparsity.needs_data(plan.sparsity):
        return _in_memory(wish)
    way = streamed_way(plan)
    if wish is not None:
        return way if wish else "memory"
    needed, free = plan.estimates.quantize_memory_bytes, free_memory_bytes()
    if free is None or needed <= MEMORY_SHARE * free:
        return "memory"
    kind = "shard by shard" if way == "data-free" else "layer by layer"
    progress.note(
        f"quantizing in memory takes about {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB that are free: streaming "
        f"{kind}, which writes the same bytes and takes about {plan.estimates.stream_memory_bytes / GIB:.1f} GiB"
    )
    return way


def _in_memory(wish: bool | None) -> Way:
    if wish:
        raise UsageError(
            "SparseGPT looks at what every layer computes, with the whole model in memory: it is not streamed",
            hint="use --sparsity-method magnitude, which gives the same bytes streamed, or --no-stream",
            code="TC-265",
        )
    return "memory"


def streamed_way(plan: Plan) -> Literal["data-free", "layers"]:
    """How ``plan`` is streamed: without data all that is known of a tensor is in the tensor."""
    return "layers" if _data_reasons(plan) else "data-free"


def require_data_free(plan: Plan) -> None:
    """UsageError TC-232 when a part of the plan looks at activations, or a format's channel scales come from them."""
    reasons = _data_reasons(plan)
    if reasons:
        raise UsageError(
            f"this plan cannot be streamed without data: {'; '.join(reasons)}",
            hint="weight-only formats, --recipe pinned (NVFP4) and --kv-cache none or fp8_cast need none; FP8 shared "
            "experts do: --shared-experts bf16. With data it is streamed layer by layer",
            code="TC-232",
        )


def _data_reasons(plan: Plan) -> list[str]:
    return data_reasons(plan.formats, get_recipe(plan.recipe, get_format(plan.format)), plan.kv_cache)


def free_memory_bytes() -> int | None:
    """What the kernel says a new program could take without swapping; None where it does not tell."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
