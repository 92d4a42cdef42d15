"""Families: how each model family names its parts.

A new family is one file here and one entry in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from toolchain.families.base import Family, Part
from toolchain.families.deepseek import DEEPSEEK
from toolchain.families.dense import DENSE
from toolchain.families.glm4_moe import GLM4_MOE
from toolchain.families.gpt_oss import GPT_OSS
from toolchain.families.llama4 import LLAMA4
from toolchain.families.lookup import find_family, is_generic
from toolchain.families.minimax import MINIMAX
from toolchain.families.mixtral import MIXTRAL
from toolchain.families.qwen2_moe import QWEN2_MOE
from toolchain.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (
    QWEN3_MOE,
    QWEN2_MOE,
    MIXTRAL,
    DEEPSEEK,
    GLM4_MOE,
    MINIMAX,
    GPT_OSS,
    LLAMA4,
    DENSE,
)


def get_family(
    model_type: str,
    architecture: str,
    tensor_names: Iterable[str],
    *,
    config: Mapping[str, Any] | None = None,
) -> Family:
    """The family of a model; see ``find_family``. UsageError TC-020 names what was not recognised."""
    return find_family(FAMILIES, model_type, architecture, tensor_names, config=config)


__all__ = ["FAMILIES", "Family", "Part", "get_family", "is_generic"]
