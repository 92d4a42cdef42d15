"""One Linear whose weight stays packed."""

from __future__ import annotations

import torch
from torch import nn

from toolchain.kernels.kinds import Kind
from toolchain.kernels.packing import Packed
from toolchain.kernels.settings import Shape
from toolchain.modeling.packed.chooser import Chooser


class PackedLinear(nn.Module):
    """Drop-in for ``nn.Linear``: [..., K] -> [..., N], in the dtype of its input."""

    def __init__(self, packed: Packed, chooser: Chooser) -> None:
        super().__init__()
        self.packed, self.chooser = packed, chooser
        self.in_features, self.out_features = packed.k, packed.n
        self.shape = Shape(kind=packed.kind, n=packed.n, k=packed.k, experts=1, top_k=1, gated=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from toolchain.kernels.launch import multiply

        rows = x.reshape(-1, self.in_features)
        settings = self.chooser.settings(self.shape, rows.shape[0])
        out = multiply(self.packed, rounded(rows, self.packed), settings, out_dtype=x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.packed.kind.format}"


def rounded(rows: torch.Tensor, packed: Packed) -> object:
    """``rows`` as the kernel of one matrix takes them."""
    from toolchain.kernels.launch import round_inputs

    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    kind: Kind = packed.kind
    return rows if kind.rounding == "none" else round_inputs(rows, kind, packed.input_scale)
