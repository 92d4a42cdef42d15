"""Names of experts that a checkpoint stores fused: one 3-D tensor for all experts of a layer and projection.

The stored name ``P.experts.gate_up_proj_weight_scale`` is read as suffix ``weight_scale`` of a module
``P.experts.gate_up_proj``, as if it were ``P.experts.gate_up_proj.weight_scale``. Sources: ModelOpt 0.47's unified
export of gpt-oss and Llama 4 (``_weight_scale``, ``_weight_scale_2``, ``_input_scale``), and the MXFP4 files that
OpenAI published gpt-oss in (``_blocks``, ``_scales``).
"""

from __future__ import annotations

import re

GATE_UP, DOWN = "gate_up_proj", "down_proj"
MXFP4 = "mxfp4"
"""The format whose fused storage is that of the published gpt-oss and not ModelOpt's."""

_NAME = re.compile(rf"^(.*\.experts\.(?:{GATE_UP}|{DOWN}))(?:_([a-z0-9_]+))?$")
_MX_NAMES = {"weight": "blocks", "weight_scale": "scales"}
_SUFFIXES = {stored: suffix for suffix, stored in _MX_NAMES.items()}


def split_name(name: str) -> tuple[str, str] | None:
    """(module, suffix) of a fused expert tensor; None for any other name."""
    found = _NAME.match(name)
    if found is None:
        return None
    module, stored = found.groups()
    return module, _SUFFIXES.get(stored, stored) if stored else "weight"


def join_name(module: str, suffix: str, format_name: str) -> str:
    """Inverse of ``split_name`` for a fused module that is stored in ``format_name``."""
    if format_name == MXFP4:
        suffix = _MX_NAMES.get(suffix, suffix)
    return module if suffix == "weight" else f"{module}_{suffix}"


def projections(module: str, gate_up_down: tuple[str, str, str]) -> tuple[str, ...]:
    """The projections that the fused ``module`` holds for each expert."""
    return gate_up_down[:2] if module.rpartition(".")[2] == GATE_UP else gate_up_down[2:]


def members(module: str, experts: int, gate_up_down: tuple[str, str, str]) -> list[list[str]]:
    """Per expert, the names of the matrices in the fused ``module``: ``P.experts.3.gate_proj``..."""
    head = module.rpartition(".")[0]
    names = projections(module, gate_up_down)
    return [[f"{head}.{expert}.{name}" for name in names] for expert in range(experts)]
