"""The ``algorithm`` of a ModelOpt recipe -> ingredients of ``toolchain.recipes``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.quantize.recipe_patterns import Setting, asks_pinned, is_nvfp4

_SAME = {
    "max": (),
    "awq_lite": ("awq",),
    "awq_clip": ("clip",),
    "awq_full": ("awq", "clip"),
    "smoothquant": ("smoothquant",),
    "gptq": ("gptq",),
    "local_hessian": ("local_hessian",),
}
"""Methods of ``modelopt.torch.quantization.config`` and what does the same here."""

_REASONS = {
    "svdquant": "its low-rank branch is stored beside each weight, and no runtime of the targets here reads it",
    "lsq": "it learns scales while training: `toolchain qat --method qad`",
}


def ingredients(algorithm: Any, *, four_over_six: bool) -> tuple[str, ...]:
    """Names of ingredients. ``four_over_six``: the recipe's weight quantizers have that flag.

    UsageError TC-159 for a method that has no counterpart. How ModelOpt goes through the model (``layerwise``) is left
    out: the numbers are the same.
    """
    if algorithm is None:
        return ()
    if isinstance(algorithm, (list, tuple)):
        return tuple(name for item in algorithm for name in ingredients(item, four_over_six=four_over_six))
    settings = {"method": algorithm} if isinstance(algorithm, str) else dict(algorithm)
    method = settings.get("method")
    if method is None:
        return ()
    if method == "mse":
        return _mse(settings, four_over_six)
    if method == "nvfp4_act_headroom":
        return (*ingredients(settings.get("weight_scale_algorithm"), four_over_six=four_over_six), "headroom")
    if method not in _SAME:
        raise UsageError(
            f"the recipe's algorithm {method!r} is not available"
            + (f": {_REASONS[method]}" if method in _REASONS else ""),
            hint=f"available: {', '.join([*_SAME, 'mse', 'nvfp4_act_headroom'])}",
            code="TC-159",
        )
    return _SAME[str(method)]


def _mse(settings: Mapping[str, Any], four_over_six: bool) -> tuple[str, ...]:
    if settings.get("fp8_scale_sweep"):
        return ("mse",)
    if four_over_six:
        return ("four_over_six",)
    raise UsageError(
        "the recipe's algorithm mse searches multipliers of amax, without fp8_scale_sweep",
        hint="set fp8_scale_sweep: true, which tries every E4M3 scale",
        code="TC-159",
    )


def pinned_inputs(inputs: list[Setting]) -> tuple[str, ...]:
    """The ingredient ``pinned``, where all NVFP4 inputs have a constant range; UsageError TC-159 where some do."""
    nvfp4 = {id(item): item for item in inputs if item.enabled and is_nvfp4(item)}.values()
    asked = {asks_pinned(item) for item in nvfp4}
    if asked == {True, False}:
        patterns = [item.pattern for item in nvfp4 if asks_pinned(item)]
        raise UsageError(
            f"the recipe fixes the input range of some NVFP4 modules ({patterns[0]}) and calibrates others",
            hint="fix all of them, or none",
            code="TC-159",
        )
    return ("pinned",) if asked == {True} else ()
