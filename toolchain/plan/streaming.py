"""How a plan can be quantized without the whole model in memory, and what that takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial

from toolchain.formats import get_format
from toolchain.formats.base import DTYPE_BYTES
from toolchain.formats.kv import get_kv_cache
from toolchain.models.types import ModelInfo
from toolchain.plan.memory import mlp_width
from toolchain.plan.types import Calibration, Serving
from toolchain.recipes import GRAM_BUDGET_BYTES, Recipe

PACKING_BYTES = 400 << 20
"""Rows in float32 and the temporaries of codecs on two threads (measured: ``benchmarks/streaming``)."""


def data_reasons(formats: Iterable[str], recipe: Recipe, kv_cache: str) -> list[str]:
    """Why more than the tensor itself must be looked at to quantize it; empty where nothing else is."""
    formats = list(formats)
    reasons = [f"{name} stores an input scale" for name in formats if _observes(recipe, name)]
    reasons += [f"{name} stores channel scales" for name in formats if get_format(name).has_pre_quant_scale]
    if get_kv_cache(kv_cache).calibrated:
        reasons.append(f"KV cache {kv_cache} is calibrated")
    return reasons + [f"recipe {item.name} looks at inputs" for item in recipe.ingredients if item.needs_data]


def _observes(recipe: Recipe, format_name: str) -> bool:
    """True when ranges of inputs are measured for a format."""
    return get_format(format_name).has_input_scale and recipe.for_format(format_name).on("inputs") != "pinned"


def stream_memory(
    info: ModelInfo,
    formats: Iterable[str],
    recipe: Recipe,
    kv_cache: str,
    calibration: Calibration,
    gram_bytes: int,
) -> tuple[int, int, str]:
    """(memory beside the libraries', scratch disk, way): bytes, and ``data-free`` or ``layers``.

    ``gram_bytes``: second moments of the layer with most of them, as the estimate in memory has them.
    """
    formats = list(formats)
    if not data_reasons(formats, recipe, kv_cache):
        return PACKING_BYTES, 0, "data-free"
    layers: dict[int | None, int] = defaultdict(int)
    for tensor in info.tensors:
        layers[info.part(tensor.name).layer] += tensor.bytes
    around = layers.pop(None, 0)
    largest = max(layers.values(), default=0)
    element = DTYPE_BYTES[info.dtype]
    tokens = calibration.batch_size * calibration.length_tokens
    width = 8 * info.hidden_size + 4 * mlp_width(info, Serving(max_batch_size=1, max_seq_len=1))
    # A layer, and its weights again: rounded for the pass that computes the next inputs, or as they were.
    held = largest * (3 if recipe.on("target") else 2)
    memory = max(held, around) + tokens * width * element
    walked = recipe.walks
    if walked:
        memory += min(GRAM_BUDGET_BYTES, gram_bytes)
    observed = get_kv_cache(kv_cache).calibrated or any(map(partial(_observes, recipe), formats))
    streams = walked + observed
    hidden = calibration.samples * calibration.length_tokens * info.hidden_size * element
    return memory, 2 * streams * hidden, "layers"


BASIS = {
    "data-free": "streamed = a few rows per thread, whatever the model's size",
    "layers": "streamed = the largest layer twice (three times where a recipe compares it with what it was) + "
    "activations of one batch + Gram matrices of the recipe, and on disk the inputs of one layer and the next",
}
"""What ``stream_memory`` rests on, by way."""
