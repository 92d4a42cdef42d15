"""compressed-tensors: what its ``quantization_config`` says, in the words of ModelOpt's formats.

``config_groups`` name schemes (bits, type, strategy of weights and inputs) and their targets: module names, ``re:``
expressions, or the class ``Linear``. ``ignore`` names what keeps its dtype. Layouts confirmed on checkpoints written by
llm-compressor 0.14.0.1 with compressed-tensors 0.19.0: NVFP4, NVFP4A16, FP8, FP8_DYNAMIC, FP8_BLOCK, W4A16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from toolchain.checkpoint.quant_config import MIXED, TIED_HEAD, QuantConfig, kv_algo_of_scheme
from toolchain.core.errors import ToolchainError
from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.families import Family
from toolchain.formats import Format, get_format

METHOD = "compressed-tensors"
LINEAR = "Linear"
_LINEAR_ROLES = (*QUANTIZABLE, Role.ROUTER, Role.LM_HEAD)
"""Parts that runtimes build as Linear: those that a class target reaches unless `ignore` names them."""


@dataclass(frozen=True, kw_only=True)
class Group:
    name: str
    format: Format
    targets: tuple[str, ...]

    def takes(self, module: str) -> bool:
        """True when the targets name ``module``; the class Linear names every matrix."""
        return LINEAR in self.targets or names(self.targets, module)


def names(patterns: Iterable[str], module: str) -> bool:
    """True when one of the names or ``re:`` expressions is that of ``module``."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return True
        elif pattern == module:
            return True
    return False


def read_groups(config: Mapping[str, Any]) -> tuple[Group, ...]:
    """The groups of a ``quantization_config``. ToolchainError TC-341 when one has no format of ModelOpt's."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("quantization_config has no config_groups")
    if config.get("sparsity_config"):
        raise _refused("the weights are stored sparse (sparsity_config)")
    if config.get("transform_config"):
        raise _refused("its inputs are transformed at run time (transform_config)")
    return tuple(
        Group(name=name, format=_format(name, group), targets=tuple(group.get("targets") or ()))
        for name, group in groups.items()
    )


def _format(name: str, group: Mapping[str, Any]) -> Format:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    if not weights.get("symmetric", True) or group.get("output_activations"):
        raise _refused(f"{name} has zero points or quantized outputs")
    if weights.get("actorder") == "group":
        raise _refused(f"{name} stores its columns in groups of another order (actorder: group)")
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
    asked = (inputs.get("num_bits"), inputs.get("type"), inputs.get("strategy")) if inputs else None
    size, static = weights.get("group_size"), inputs.get("dynamic") is False
    found = ""
    if kind == (4, "float", "tensor_group") and size == 16:
        found = "nvfp4" if asked == (4, "float", "tensor_group") else "" if asked else "w4a16_nvfp4"
    elif kind == (8, "float", "tensor") and asked == (8, "float", "tensor") and static:
        found = "fp8"
    elif kind == (8, "float", "channel") and asked == (8, "float", "token"):
        found = "fp8_per_channel_per_token"
    elif kind == (8, "float", "block") and weights.get("block_structure") == [128, 128]:
        found = "fp8_block" if asked == (8, "float", "group") and inputs.get("group_size") == 128 else ""
    elif kind == (4, "int", "group") and size == 128 and asked is None:
        found = "int4_awq"
    if not found:
        raise _refused(f"{name}: weights {_words(weights)}, inputs {_words(inputs)}")
    return get_format(found)


def _words(scheme: Mapping[str, Any]) -> str:
    if not scheme:
        return "not quantized"
    words = [f"{scheme.get('type')}{scheme.get('num_bits')}", f"per {scheme.get('strategy')}"]
    words += [f"of {scheme['group_size']}"] if scheme.get("group_size") else []
    return " ".join([*words, "dynamic" if scheme.get("dynamic") else "static"])


def _refused(what: str) -> ToolchainError:
    return ToolchainError(
        f"this compressed-tensors checkpoint has no counterpart in ModelOpt's layout: {what}",
        hint="NVFP4, NVFP4A16, FP8 (static per tensor), FP8_DYNAMIC (per channel), FP8_BLOCK (128 x 128) and W4A16 "
        "(groups of 128, symmetric) have one",
        code="TC-341",
    )


def quant_config(
    config: Mapping[str, Any],
    groups: tuple[Group, ...],
    family: Family,
    quantized: Iterable[str],
    plain: Iterable[str],
) -> QuantConfig:
    """The same as a ModelOpt config says it: one algorithm, or MIXED_PRECISION, and what is excluded by name.

    ``quantized`` and ``plain`` are the matrices by what their bytes are. Entries of `ignore` that name nothing are kept
    as they are, for the audit to find.
    """
    ignore = tuple(config.get("ignore") or ())
    layers = {module: group_of(groups, module).format.quant_algo for module in quantized}
    plain = list(plain)
    excluded = [module for module in plain if names(ignore, module) or not _is_taken(groups, family, module)]
    unused = [pattern for pattern in ignore if not any(names((pattern,), module) for module in plain)]
    algos = sorted(set(layers.values())) or [groups[0].format.quant_algo]
    mixed = len(algos) > 1 or any(family.classify(module).role is Role.LM_HEAD for module in layers)
    only = groups[0].format if len(groups) == 1 else None
    return QuantConfig(
        quant_algo=MIXED if mixed else algos[0],
        kv_cache_quant_algo=kv_algo_of_scheme(config.get("kv_cache_scheme")),
        group_size=only.group_size if only else None,
        exclude_modules=tuple(dict.fromkeys((*excluded, *unused))),
        quantized_layers=layers if mixed else {},
        producer_version=str(config.get("version", "")),
        shape=METHOD,
    )


def _is_taken(groups: tuple[Group, ...], family: Family, module: str) -> bool:
    """True when some target reaches ``module``: the class Linear reaches what runtimes build as one."""
    by_name = any(names(group.targets, module) for group in groups)
    by_class = any(LINEAR in group.targets for group in groups)
    return by_name or (by_class and module != TIED_HEAD and family.classify(module).role in _LINEAR_ROLES)


def group_of(groups: tuple[Group, ...], module: str) -> Group:
    """The group whose targets name ``module``; names go before the class, and the first is everyone's."""
    by_name = next((group for group in groups if names(group.targets, module)), None)
    return by_name or next((group for group in groups if group.takes(module)), groups[0])
