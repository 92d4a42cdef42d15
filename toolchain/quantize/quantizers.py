"""From a Plan to ModelOpt's quantizer config: its own preset, minus what the policy keeps in the source dtype."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.core.roles import QUANTIZABLE
from toolchain.families import Family
from toolchain.formats import get_format
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.quantize import backend
from toolchain.recipes import get_recipe


def planned_modules(model: nn.Module, plan: Plan, family: Family) -> dict[str, str]:
    """Module path -> format name, for every Linear of the model that the plan quantizes."""
    chosen = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            format_name = plan.format_of(family, family.to_checkpoint(path))
            if format_name != SOURCE_DTYPE:
                chosen[path] = format_name
    return chosen


def modelopt_config(model: nn.Module, plan: Plan, family: Family) -> dict[str, Any]:
    """A config for ``mtq.quantize``. The search algorithm is ``max``: AWQ's is ours (``accuracy/awq.py``)."""
    import modelopt.torch.quantization as mtq

    found = get_format(plan.format)
    config = _preset(mtq, found.modelopt_preset)
    chosen = planned_modules(model, plan, family)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    config["quant_cfg"] += [
        {"quantizer_name": f"{path}.*", "enable": False} for path in linears if path not in chosen
    ]
    if plan.kv_cache == "fp8":
        config["quant_cfg"] += _preset(mtq, "FP8_KV_CFG")["quant_cfg"]
    config["algorithm"] = "max"
    backend.register()
    backend.use_in(config["quant_cfg"])
    return config


def observes_inputs(plan: Plan) -> bool:
    """True when ModelOpt's own pass must see activations: for input scales or for the scales of the KV cache."""
    return plan.kv_cache != "none" or any(get_format(name).has_input_scale for name in plan.formats)


def needs_data(plan: Plan) -> bool:
    """True when anything of the plan looks at activations."""
    return observes_inputs(plan) or get_recipe(plan.recipe, get_format(plan.format)).needs_data


def _preset(mtq: Any, name: str) -> dict[str, Any]:
    """A private copy of a preset; ModelOpt keeps them as dicts or as pydantic models."""
    preset = getattr(mtq, name)
    return copy.deepcopy(preset if isinstance(preset, dict) else preset.model_dump(exclude_unset=True))


def check_coverage(model: nn.Module, plan: Plan, family: Family) -> None:
    """Hard rules, on the quantizers that ModelOpt really enabled: exactly the planned modules, nothing else.

    ToolchainError TC-201 lists modules that were skipped or that must not be quantized.
    """
    planned = planned_modules(model, plan, family)
    enabled = {
        path
        for path, module in model.named_modules()
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False)
    }
    skipped, extra = sorted(set(planned) - enabled), sorted(enabled - set(planned))
    forbidden = [
        path for path in enabled if family.classify(family.to_checkpoint(path)).role not in QUANTIZABLE
    ]
    if skipped or extra or forbidden:
        raise ToolchainError(
            f"ModelOpt quantized other modules than planned: {len(skipped)} skipped {skipped[:3]}, "
            f"{len(extra)} too many {extra[:3]}, {len(forbidden)} that never may be {forbidden[:3]}",
            hint="the family's declaration and the model disagree: see CONTRIBUTING, `add a family`",
            code="TC-201",
        )


def fused_groups(modules: dict[str, str], family: Family) -> list[list[str]]:
    """Quantized module paths, grouped as runtimes fuse them: q/k/v of one attention, gate/up of one expert, or the
    same of all experts where one tensor holds them."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path in modules:
        groups.setdefault(family.shared_scales(family.to_checkpoint(path)), []).append(path)
    return list(groups.values())
