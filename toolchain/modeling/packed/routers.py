"""Routers of transformers whose choice of experts is one kernel. Others keep their own forward."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from toolchain.kernels.sorting import Scoring


def fuse_routers(model: nn.Module) -> int:
    """Replace the forward of every router that is known here; returns how many. Outputs keep shapes and dtypes."""
    count = 0
    for module in model.modules():
        known = ROUTERS.get(type(module).__name__)
        if known is not None:
            module.forward = MethodType(known, module)
            count += 1
    return count


def _softmax(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qwen2-MoE, Qwen3-MoE, OLMoE: softmax over all experts, perhaps normalized, in the dtype of the logits."""
    logits = functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
    scoring = _scoring("softmax", router, normalize=bool(router.norm_topk_prob))
    return _chosen(logits, scoring, dtype=logits.dtype)


def _mixtral(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
    return _chosen(logits, _scoring("softmax", router, normalize=True))


def _gpt_oss(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = functional.linear(hidden, router.weight, router.bias)
    return _chosen(logits, _scoring("chosen", router), dtype=logits.dtype)


def _grouped_sigmoid(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepSeek-V3, GLM-4.5: sigmoid, a bias for the choice alone, the best groups, weights scaled."""
    hidden = hidden.reshape(-1, router.hidden_dim)
    logits = functional.linear(hidden.float(), router.weight.float())
    scoring = _scoring(
        "sigmoid",
        router,
        normalize=bool(router.norm_topk_prob),
        epsilon=1e-20,
        factor=float(router.routed_scaling_factor),
        groups=router.num_group,
        top_groups=router.topk_group,
        best_of_group=2,
    )
    return _chosen(logits, scoring, bias=router.e_score_correction_bias)


def _minimax(
    router: Any, hidden: torch.Tensor, e_score_correction_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = hidden.reshape(-1, router.hidden_dim)
    logits = functional.linear(hidden.to(router.weight.dtype), router.weight)
    return _chosen(logits, _scoring("sigmoid", router, normalize=True), bias=e_score_correction_bias)


def _scoring(name: str, router: Any, **options: Any) -> Scoring:
    from toolchain.kernels.sorting import Scoring

    return Scoring(scoring=name, top_k=int(router.top_k), **options)


def _chosen(
    logits: torch.Tensor,
    scoring: Scoring,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, weights, ids), the order of transformers 5."""
    from toolchain.kernels.sorting import choose_experts

    ids, weights = choose_experts(logits, scoring, bias)
    return logits, weights.to(dtype) if dtype else weights, ids.long()


ROUTERS: dict[str, Callable[..., Any]] = {
    "Qwen2MoeTopKRouter": _softmax,
    "Qwen3MoeTopKRouter": _softmax,
    "OlmoeTopKRouter": _softmax,
    "MixtralTopKRouter": _mixtral,
    "GptOssTopKRouter": _gpt_oss,
    "DeepseekV3TopkRouter": _grouped_sigmoid,
    "Glm4MoeTopkRouter": _grouped_sigmoid,
    "MiniMaxM2TopKRouter": _minimax,
}
"""Class name in transformers 5 -> a forward of the same mathematics."""
