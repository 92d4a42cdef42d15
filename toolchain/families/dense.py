"""Dense decoders with Llama's names: Llama 2 and 3, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import NORM_ROLES, Family

DENSE = Family(
    name="dense",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    roles=(
        *NORM_ROLES,
        (r"\.mlp\.(gate|up|down)_proj$", Role.DENSE_MLP),
        (r"\.self_attn\.[qkvo]_proj$", Role.ATTENTION),
    ),
)
