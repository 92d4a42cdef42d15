"""The experts of one layer in two fused multiplications."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolchain.kernels.packing import Packed
from toolchain.kernels.settings import Shape
from toolchain.modeling.expert_variants import ClampedExpertMLP, ScaledInputExperts
from toolchain.modeling.experts import ExpertMLP, UnfusedExperts
from toolchain.modeling.packed.chooser import Chooser

if TYPE_CHECKING:
    from toolchain.kernels.launch import Activation, Rounded
    from toolchain.kernels.sorting import Route


class FusedExperts(UnfusedExperts):
    """(hidden [T, H], indices [T, k], weights [T, k]) -> [T, H], as ``UnfusedExperts``, of which it holds none."""

    def __init__(
        self,
        gate_up: Packed,
        down: Packed,
        activation: Activation,
        chooser: Chooser,
        *,
        scales_input: bool,
        top_k: int,
    ) -> None:
        super().__init__([])
        self.num_experts = gate_up.experts
        self.gate_up, self.down, self.activation, self.chooser = gate_up, down, activation, chooser
        self.scales_input = scales_input
        self.gate_up_shape = Shape(
            kind=gate_up.kind, n=gate_up.n, k=gate_up.k, experts=gate_up.experts, top_k=top_k, gated=True
        )
        self.down_shape = Shape(
            kind=down.kind, n=down.n, k=down.k, experts=down.experts, top_k=top_k, gated=False
        )
        self._common = {id(packed): _is_common(packed) for packed in (gate_up, down)}

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from toolchain.kernels.launch import multiply
        from toolchain.kernels.sorting import combine, make_route

        tokens, top_k = indices.shape
        first, second = self.chooser.pair(self.gate_up_shape, self.down_shape, tokens)
        route = make_route(indices, self.num_experts, first.block_m)
        div = top_k
        flat: torch.Tensor | None = weights.reshape(-1).float()
        if self.scales_input:
            hidden = hidden.repeat_interleave(top_k, 0) * weights.reshape(-1, 1).to(hidden.dtype)
            div, flat = 1, None
        x, div = self._rounded(hidden.contiguous(), self.gate_up, route, div)
        inner = multiply(
            self.gate_up, x, first, out_dtype=hidden.dtype, route=route, x_div=div, activation=self.activation
        )
        x, div = self._rounded(inner, self.down, route, 1)
        pairs = multiply(self.down, x, second, out_dtype=hidden.dtype, route=route, x_div=div, weights=flat)
        return combine(pairs, indices, self.num_experts)

    def _rounded(
        self, x: torch.Tensor, packed: Packed, route: Route, div: int
    ) -> tuple[torch.Tensor | Rounded, int]:
        """``x`` as the kernel takes it, and how many pairs share a row of it."""
        from toolchain.kernels.launch import round_inputs

        kind = packed.kind
        if kind.rounding == "none":
            return x, div
        if self._common[id(packed)]:
            return round_inputs(x, kind, packed.input_scale), div
        return round_inputs(x, kind, packed.input_scale, route.ids, div), 1

    def extra_repr(self) -> str:
        return f"{self.num_experts} x {self.gate_up.kind.format}, {self.gate_up.k} to {self.gate_up.n // 2}"


def _is_common(packed: Packed) -> bool:
    """Whether all experts round their inputs alike: then each token is rounded once."""
    scale = packed.input_scale
    return packed.kind.rounding not in ("tensor", "nvfp4") or scale is None or bool((scale == scale[0]).all())


def activation_of(experts: Sequence[nn.Module]) -> Activation | None:
    """What the kernels compute between gate and up; None for what they do not know."""
    from toolchain.kernels.launch import Activation

    first: Any = experts[0]
    if isinstance(first, ClampedExpertMLP):
        return Activation(clamped=True, alpha=float(first.alpha), limit=float(first.limit))
    if isinstance(first, ExpertMLP) and type(first.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return Activation()
    return None


def scales_its_input(experts: UnfusedExperts) -> bool:
    return isinstance(experts, ScaledInputExperts)
