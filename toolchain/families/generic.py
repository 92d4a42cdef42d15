"""The rule for a model_type that nobody has declared, when its tensors carry the usual names.

Three declarations: dense, and two for mixtures of experts, because the names of an expert's projections are
part of a family: ``gate_proj/up_proj/down_proj`` and ``w1/w3/w2``. None folds scales into norms:
whether a norm has other consumers, or multiplies by ``1 + weight``, cannot be read from names.
"""

from __future__ import annotations

from toolchain.core.roles import Role
from toolchain.families.base import NORM_ROLES, Family

_ROLES: tuple[tuple[str, Role], ...] = (
    *NORM_ROLES,
    (r"\.(gate|gate\.wg|router|shared_expert_gate|e_score_correction_bias)$", Role.ROUTER),
    (r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)$", Role.ROUTED_EXPERT),
    (r"\.(shared_experts?|shared_mlp)\.", Role.SHARED_EXPERT),
    (r"\.(mlp|feed_forward|ffn|block_sparse_moe)\.(gate|up|down)_proj$", Role.DENSE_MLP),
    (r"\.(self_attn|attention)\.[qkvo]_proj$", Role.ATTENTION),
)

GENERIC_MOE = Family(
    name="generic_moe",
    model_types=(),
    roles=_ROLES,
    num_experts_key="num_experts",
    norm_folds=(),
)

GENERIC_MOE_W123 = Family(
    name="generic_moe_w123",
    model_types=(),
    roles=_ROLES,
    num_experts_key="num_local_experts",
    gate_up_down=("w1", "w3", "w2"),
    norm_folds=(),
)

GENERIC_DENSE = Family(name="generic_dense", model_types=(), roles=_ROLES, norm_folds=())

GENERIC: tuple[Family, ...] = (GENERIC_MOE, GENERIC_MOE_W123, GENERIC_DENSE)
