"""From a Plan to ModelOpt's quantizers: its own presets, each on exactly the modules that the plan gives the format.

Settings are put on modules by name (``set_quantizer_attributes_full`` with a predicate) and not by patterns: ModelOpt
matches every pattern with every module, and a large mixture of experts in mixed precision has 50,000 of both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.core.roles import ASSIGNABLE
from toolchain.families import Family
from toolchain.formats import Format, get_format, get_kv_cache
from toolchain.formats.fp8_block import BLOCK
from toolchain.plan import sparsity
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.quantize import backend
from toolchain.quantize.headroom import headroom
from toolchain.recipes import get_recipe

ADDED_INPUTS: dict[str, dict[str, Any]] = {
    "fp8_group": {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: BLOCK, "type": "dynamic"}},
}
"""Input quantizers of activations that no preset of ModelOpt has: its block preset is for weights only, while every
runtime of the format computes on FP8 inputs."""

PINNED_AMAX = 448.0 * 6
"""Input range under which NVFP4's ``input_scale``, amax / (448 * 6), is 1."""


def planned_modules(model: nn.Module, plan: Plan, family: Family) -> dict[str, str]:
    """Module path -> format name, for every Linear of the model that the plan quantizes."""
    chosen = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            format_name = plan.format_of(family, family.to_checkpoint(path))
            if format_name != SOURCE_DTYPE:
                chosen[path] = format_name
    return chosen


def quantize(
    model: nn.Module, plan: Plan, family: Family, forward: Callable[[Any], None] | None
) -> dict[str, str]:
    """Insert quantizers as planned and observe their ranges (ModelOpt's ``max``); returns ``planned_modules``.

    Weight scales, codes and channel scales are chosen afterwards, by the plan's recipe. ``forward`` runs the
    calibration data, and only when the plan observes inputs. ToolchainError TC-201 when ModelOpt did something else
    than planned.
    """
    modules = insert(model, plan, family)
    recipe = get_recipe(plan.recipe, get_format(plan.format))
    roomy = [path for path, name in modules.items() if recipe.for_format(name).on("inputs") == "headroom"]
    with headroom(model, roomy):
        _observe(model, modules, forward if observes_inputs(plan) else None)
    _complete_pre_quant_scales(model, modules, family)
    return modules


def insert(model: nn.Module, plan: Plan, family: Family) -> dict[str, str]:
    """Quantizers as planned, without ranges; returns ``planned_modules``. TC-201 as in ``quantize``."""
    import modelopt.torch.quantization as mtq

    backend.register()
    off = {"quantizer_name": "*", "enable": False}
    mtq.quantize(model, {"quant_cfg": [off, *_kv_entries(plan)], "algorithm": None})
    modules = planned_modules(model, plan, family)
    for name in plan.formats:
        paths = [path for path, chosen in modules.items() if chosen == name]
        for kind, settings in quantizer_settings(get_format(name)).items():
            if kind == "input_quantizer" and is_pinned(plan, name):
                settings = {**settings, "constant_amax": PINNED_AMAX}
            _set(model, {f"{path}.{kind}" for path in paths}, settings)
    check_coverage(model, plan, family)
    return modules


@torch.no_grad()
def _observe(model: nn.Module, modules: dict[str, str], forward: Callable[[Any], None] | None) -> None:
    """ModelOpt's ``max`` calibration by its own steps. ``mtq.calibrate`` looks up the name of every module in a list of
    all modules (``_get_module_name``): an hour for the 45,000 matrices of a DeepSeek-V3."""
    from modelopt.torch.quantization.model_calib import enable_stats_collection, finish_stats_collection

    enable_stats_collection(model)
    for path in modules:
        linear: Any = model.get_submodule(path)
        linear.weight_quantizer(linear.weight)
    if forward is not None:
        forward(model)
    finish_stats_collection(model)


def quantizer_settings(format: Format) -> dict[str, Any]:
    """``weight_quantizer`` and ``input_quantizer`` -> settings, from the format's preset; no entry: stays off.

    Settings are one dict, or a list of them for quantizers in sequence (W4A8: INT4, then FP8).
    """
    import modelopt.torch.quantization as mtq

    preset = getattr(mtq, format.modelopt_preset)
    preset = preset if isinstance(preset, dict) else preset.model_dump(exclude_unset=True)
    found: dict[str, Any] = {}
    for entry in copy.deepcopy(preset["quant_cfg"]):
        for kind in ("weight_quantizer", "input_quantizer"):
            if entry.get("cfg") and entry["quantizer_name"].endswith(kind):
                found.setdefault(kind, entry["cfg"])
    if format.activation in ADDED_INPUTS:
        found["input_quantizer"] = ADDED_INPUTS[format.activation]
    return {
        kind: [backend.adapt(item) for item in cfg]
        if isinstance(cfg, list)
        else backend.adapt(cfg, stored=kind == "weight_quantizer")
        for kind, cfg in found.items()
    }


def _set(model: nn.Module, names: set[str], settings: Any) -> None:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.conversion import set_quantizer_attributes_full

    attributes = (
        [QuantizerAttributeConfig(**item, enable=True) for item in settings]
        if isinstance(settings, list)
        else QuantizerAttributeConfig(**settings, enable=True)
    )
    set_quantizer_attributes_full(model, names.__contains__, attributes)


def _kv_entries(plan: Plan) -> list[dict[str, Any]]:
    preset = get_kv_cache(plan.kv_cache).modelopt_preset
    if not preset:
        return []
    from modelopt.recipe.presets import KV_QUANT_CFG_CHOICES

    entries = copy.deepcopy(KV_QUANT_CFG_CHOICES[preset]["quant_cfg"])
    for entry in entries:
        entry["cfg"] = backend.adapt(entry["cfg"])
        if tuple(entry["cfg"]["num_bits"]) == backend.E2M1:
            # ModelOpt stores amax / 448 for every KV cache (``kv_cache_max_bound``), and attention kernels expand
            # blocks to FP8.
            entry["cfg"]["backend_extra_args"] = backend.FP8_RANGE
    return entries


def _complete_pre_quant_scales(model: nn.Module, modules: dict[str, str], family: Family) -> None:
    """A channel scale of 1 for every module that stores one, until a recipe finds a better: runtimes ask for the tensor
    of each Linear whose norm does not take it."""
    folded = folded_modules(model, modules, family)
    for path, name in modules.items():
        if get_format(name).has_pre_quant_scale and path not in folded:
            linear: Any = model.get_submodule(path)
            linear.input_quantizer._enable_pre_quant_scale = True
            linear.input_quantizer.pre_quant_scale = torch.ones_like(linear.weight[0])


def folded_modules(model: nn.Module, modules: dict[str, str], family: Family) -> set[str]:
    """Paths whose channel scale a norm takes: it feeds them and nothing else, all in one format."""
    return fold_sites({path for path, _ in model.named_modules()}, modules, family)[1]


def fold_sites(present: set[str], modules: dict[str, str], family: Family) -> tuple[set[str], set[str]]:
    """(norms, their consumers) among the module paths ``present``, of which ``modules`` are quantized."""
    layers = {found.group() for path in modules if (found := re.match(r".*?\blayers\.\d+", path))}
    norms, folded = set[str](), set[str]()
    for layer in layers:
        for norm, consumers in family.norm_folds:
            paths = [path for name in consumers if (path := f"{layer}.{name}") in present]
            if len({modules.get(path) for path in paths}) == 1 and paths[0] in modules:
                norms.add(f"{layer}.{norm}")
                folded.update(paths)
    return norms, folded


def observes_inputs(plan: Plan) -> bool:
    """True when ModelOpt's own pass must see activations: for input scales or for the scales of the KV cache."""
    inputs = any(get_format(name).has_input_scale and not is_pinned(plan, name) for name in plan.formats)
    return inputs or get_kv_cache(plan.kv_cache).calibrated


def is_pinned(plan: Plan, format_name: str) -> bool:
    """True when the input scales of a format are 1 by the recipe, whatever the inputs are."""
    recipe = get_recipe(plan.recipe, get_format(plan.format))
    return recipe.for_format(format_name).on("inputs") == "pinned"


def needs_data(plan: Plan) -> bool:
    """True when anything of the plan looks at activations."""
    recipe = get_recipe(plan.recipe, get_format(plan.format))
    return observes_inputs(plan) or recipe.needs_data or sparsity.needs_data(plan.sparsity)


def check_coverage(model: nn.Module, plan: Plan, family: Family) -> None:
    """Hard rules, on the quantizers that ModelOpt really enabled: exactly the planned modules, each in its format.

    ToolchainError TC-201 lists modules that were skipped, that must not be quantized, or that got another format, by
    ModelOpt's own reading of the quantizers (what its exporter would write).
    """
    from modelopt.torch.export.quant_utils import get_quantization_format

    planned = planned_modules(model, plan, family)
    enabled = {
        path: module
        for path, module in model.named_modules()
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False)
    }
    skipped, extra = sorted(set(planned) - set(enabled)), sorted(set(enabled) - set(planned))
    forbidden = [
        path for path in enabled if family.classify(family.to_checkpoint(path)).role not in ASSIGNABLE
    ]
    other = [
        f"{path} ({kind})"
        for path in enabled.keys() & planned.keys()
        if (kind := get_quantization_format(enabled[path])) != get_format(planned[path]).modelopt_format
    ]
    if skipped or extra or forbidden or other:
        raise ToolchainError(
            f"ModelOpt quantized other modules than planned: {len(skipped)} skipped {skipped[:3]}, "
            f"{len(extra)} too many {extra[:3]}, {len(forbidden)} that never may be {forbidden[:3]}, "
            f"{len(other)} in another format {sorted(other)[:3]}",
            hint="the family's declaration and the model disagree: see CONTRIBUTING, `add a family`",
            code="TC-201",
        )


def fused_groups(modules: dict[str, str], family: Family) -> list[list[str]]:
    """Quantized module paths, grouped as scales are shared: q/k/v of one attention, gate/up of one expert, or the same
    of all experts where one tensor holds them."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path in modules:
        groups.setdefault(family.shared_scales(family.to_checkpoint(path)), []).append(path)
    return list(groups.values())
