"""Which way a plan is quantized: the whole model in memory, or streamed."""

from __future__ import annotations

from pathlib import Path

from toolchain.core.errors import UsageError
from toolchain.core.files import GIB
from toolchain.core.progress import Progress
from toolchain.formats import get_format, get_kv_cache
from toolchain.plan.types import Plan
from toolchain.quantize.quantizers import is_pinned
from toolchain.recipes import get_recipe

MEMORY_SHARE = 0.8
"""Of the memory that is free: a plan that takes more is streamed where that is possible."""


def streams(plan: Plan, wish: bool | None, progress: Progress) -> bool:
    """True when ``plan`` is to be streamed. ``wish``: what the user said; None: by the plan's estimate of memory.

    UsageError TC-232 when streaming is asked for and the plan needs data.
    """
    if wish is not None:
        if wish:
            require_data_free(plan)
        return wish
    needed, free = plan.estimates.quantize_memory_bytes, free_memory_bytes()
    if free is None or needed <= MEMORY_SHARE * free:
        return False
    said = f"quantizing in memory takes about {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB that are free"
    reasons = data_reasons(plan)
    if reasons:
        progress.note(f"{said}, and it cannot be streamed: {'; '.join(reasons)}")
        return False
    progress.note(f"{said}: streaming, which writes the same bytes")
    return True


def require_data_free(plan: Plan) -> None:
    """UsageError TC-232 when a part of the plan looks at activations, or a format's channel scales come from them."""
    reasons = data_reasons(plan)
    if reasons:
        raise UsageError(
            f"this plan needs calibration data and cannot be streamed: {'; '.join(reasons)}",
            hint="weight-only formats, --recipe pinned (NVFP4) and --kv-cache none or fp8_cast need none; FP8 shared "
            "experts do: --shared-experts bf16",
            code="TC-232",
        )


def data_reasons(plan: Plan) -> list[str]:
    reasons = [
        f"{name} stores an input scale"
        for name in plan.formats
        if get_format(name).has_input_scale and not is_pinned(plan, name)
    ]
    reasons += [
        f"{name} stores channel scales" for name in plan.formats if get_format(name).has_pre_quant_scale
    ]
    if get_kv_cache(plan.kv_cache).calibrated:
        reasons.append(f"KV cache {plan.kv_cache} is calibrated")
    recipe = get_recipe(plan.recipe, get_format(plan.format))
    return reasons + [f"recipe {item.name} looks at inputs" for item in recipe.ingredients if item.needs_data]


def free_memory_bytes() -> int | None:
    """What the kernel says a new program could take without swapping; None where it does not tell."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
