"""Stored tensors of Linears -> the layout that the kernels read, with the same bits; and back, for tests.

A matrix that is followed by a gated activation holds gate and up in alternating rows, so that one tile of the product
has both. Several experts of one layer are stacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from toolchain.codecs import e2m1
from toolchain.codecs.int4_awq import unpack_rows
from toolchain.core.errors import ToolchainError
from toolchain.kernels.kinds import UNIT, Kind

BLOCK = 128
E2M1_SHIFT = 26
"""The kernels read E2M1 codes as bfloat16 of too small an exponent (2**-126) under scales that are too large (2**100):
the factor of the row makes up for the rest."""
_BIAS = 127


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The weights of E experts, [N, K] each, as the kernels read them; a Linear of its own is one expert."""

    kind: Kind
    weight: torch.Tensor
    """uint8 [E, N, K' / 2] (four bits) or [E, N, K'] (E4M3), K' = K rounded up to whole units of 32; ``e2m1x``: [E, N,
    K / 2], as it is stored."""
    scale: torch.Tensor | None
    """[E, N, K' / group], uint8 (bits of E4M3 or E8M0) or float32; of 128 x 128 blocks [E, ..., ceil(K / 128)]."""
    factor: torch.Tensor
    """float32 [E, N]: what every row of the product is multiplied by in the end."""
    n: int
    k: int
    gated: bool = False
    """Rows alternate between gate and up."""
    bias: torch.Tensor | None = None
    """float32 [E, N]."""
    channel: torch.Tensor | None = None
    """[E, K]: factors on the input (``pre_quant_scale``), in the dtype of the model."""
    input_scale: torch.Tensor | None = None
    """float32 [E]: static scales of inputs that are rounded to E4M3 or NVFP4."""

    @property
    def experts(self) -> int:
        return self.weight.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that lies in memory, by field."""
        names = ("weight", "scale", "factor", "bias", "channel", "input_scale")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def pack(kind: Kind, experts: Sequence[Sequence[Mapping[str, torch.Tensor]]], dtype: torch.dtype) -> Packed:
    """One or two sets of stored tensors (suffix -> tensor; two: gate, then up) for each expert -> Packed.

    ``dtype``: that of the model, for channel factors. The tensors stay on their device. Raises ToolchainError TC-516
    for gate and up that cannot share one multiplication.
    """
    rows = [[_rows(kind, part) for part in parts] for parts in experts]
    gated = len(rows[0]) == 2
    k = _width(kind, experts[0][0])

    def joined(name: str) -> torch.Tensor | None:
        made = [[getattr(part, name) for part in parts] for parts in rows]
        if made[0][0] is None:
            return None
        return torch.stack([alternate(*parts) if gated else parts[0] for parts in made])

    weight, factor = joined("weight"), joined("factor")
    assert weight is not None and factor is not None
    input_scale = _input_scales(kind, experts)
    if kind.rounding == "nvfp4" and input_scale is not None:
        # The static scale of inputs is one for a whole matrix: it goes into the factors of the rows.
        factor = factor * input_scale.unsqueeze(-1)
    return Packed(
        kind=kind,
        weight=weight,
        scale=joined("scale"),
        factor=factor,
        n=weight.shape[1],
        k=k,
        gated=gated,
        bias=_biases(experts, gated),
        channel=_shared(experts, "pre_quant_scale", dtype),
        input_scale=input_scale,
    )


def alternate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Two [N, ...] -> [2 N, ...]: gate in even rows, up in odd ones."""
    return torch.stack((gate, up), dim=1).flatten(0, 1)


@dataclass(frozen=True)
class _Rows:
    weight: torch.Tensor
    scale: torch.Tensor | None
    factor: torch.Tensor


def _rows(kind: Kind, tensors: Mapping[str, torch.Tensor]) -> _Rows:
    """One matrix."""
    if kind.code == "e4m3":
        return _e4m3(kind, tensors)
    if kind.code == "e2m1x":
        factor = tensors["weight_scale_2"].float().reshape(1)
        rows = len(tensors["weight"])
        return _Rows(tensors["weight"], tensors["weight_scale"].view(torch.uint8), factor.expand(rows))
    if kind.code == "int4":
        codes = unpack_rows(tensors["weight"]).view(torch.uint8) & 0x0F
        scale = tensors["weight_scale"].float()
        factor = torch.ones(len(codes), device=codes.device)
    else:
        codes = e2m1.unpack_nibbles(tensors["weight"])
        factor = torch.full((len(codes),), 2.0**E2M1_SHIFT, device=codes.device)
        if kind.scales == "e8m0":
            scale, largest = _e8m0(tensors["weight_scale"])
            factor = factor * largest
        else:
            scale = tensors["weight_scale"].view(torch.uint8)
            factor = factor * tensors["weight_scale_2"].float()
    groups = -(-codes.shape[1] // UNIT) * UNIT // kind.group if kind.group < UNIT else scale.shape[1]
    return _Rows(units(codes), pad(scale, (0, groups - scale.shape[1])).contiguous(), factor)


def _e4m3(kind: Kind, tensors: Mapping[str, torch.Tensor]) -> _Rows:
    weight = tensors["weight"].view(torch.uint8)
    n, k = weight.shape
    weight = pad(weight, (0, -k % UNIT)).contiguous()
    if kind.scales == "block":
        scale = tensors["weight_scale_inv"] if "weight_scale_inv" in tensors else tensors["weight_scale"]
        if scale.dim() == 4:
            scale = scale.squeeze(3).squeeze(1)
        return _Rows(weight, scale.float().contiguous(), torch.ones(n, device=weight.device))
    factor = tensors["weight_scale"].float().reshape(-1).expand(n).contiguous()
    return _Rows(weight, None, factor)


def _e8m0(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponents below the row's largest, which goes into its factor: any range fits what the kernels compute with."""
    largest = stored.amax(-1)
    below = stored.int() - largest.int().unsqueeze(-1) + _BIAS + 100
    return below.clamp_(0, 255).to(torch.uint8), torch.exp2(largest.float() - _BIAS)


def units(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [N, K] below 16 -> [N, K' / 2] bytes in units of 32."""
    parts = pad(codes, (0, -codes.shape[1] % UNIT)).unflatten(1, (-1, 2, UNIT // 2))
    return (parts[:, :, 0] | (parts[:, :, 1] << 4)).flatten(1)


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of ``units`` along the last dimension, padding included."""
    parts = packed.unflatten(-1, (-1, UNIT // 2))
    return torch.stack((parts & 0x0F, parts >> 4), dim=-2).flatten(-3)


def _width(kind: Kind, tensors: Mapping[str, torch.Tensor]) -> int:
    columns = tensors["weight"].shape[1]
    return columns * 2 if kind.code in ("e2m1", "e2m1x") else columns


def _biases(experts: Sequence[Sequence[Mapping[str, torch.Tensor]]], gated: bool) -> torch.Tensor | None:
    if "bias" not in experts[0][0]:
        return None
    made = [[part["bias"].float() for part in parts] for parts in experts]
    return torch.stack([alternate(*parts) if gated else parts[0] for parts in made])


def _shared(
    experts: Sequence[Sequence[Mapping[str, torch.Tensor]]], suffix: str, dtype: torch.dtype
) -> torch.Tensor | None:
    """A tensor on the input, which gate and up have in common."""
    if not any(suffix in part for parts in experts for part in parts):
        return None
    made = []
    for parts in experts:
        first = parts[0].get(suffix)
        if first is None or any(
            suffix not in part or not torch.equal(part[suffix], first) for part in parts[1:]
        ):
            raise ToolchainError(
                f"gate and up have different {suffix}s: the fused kernels multiply both with one input",
                hint="run it with decoded weights: --kernels off",
                code="TC-516",
            )
        made.append(first.reshape(-1).to(dtype))
    return torch.stack(made)


def _input_scales(kind: Kind, experts: Sequence[Sequence[Mapping[str, torch.Tensor]]]) -> torch.Tensor | None:
    """The largest of gate's and up's, as TensorRT-LLM takes it where they differ."""
    if kind.rounding not in ("tensor", "nvfp4") or "input_scale" not in experts[0][0]:
        return None
    return torch.stack(
        [torch.stack([p["input_scale"].float().reshape(()) for p in parts]).amax() for parts in experts]
    )


def unpacked(packed: Packed) -> torch.Tensor:
    """float64 [E, N, K]: the values, from the packed bits alone. For tests."""
    kind = packed.kind
    factor = packed.factor.double().unsqueeze(-1)
    if kind.code == "e2m1x":
        assert packed.scale is not None and packed.input_scale is not None
        values = e2m1.values_of(e2m1.unpack_nibbles(packed.weight)).double()
        values = values * packed.scale.view(torch.float8_e4m3fn).double().repeat_interleave(16, -1)
        return values * factor / packed.input_scale.double().reshape(-1, 1, 1)
    if kind.code == "e4m3":
        values = packed.weight.view(torch.float8_e4m3fn).double()
        if packed.scale is not None:
            values = values * _spread_blocks(packed, packed.scale.double(), values.shape[-1])
        return (values * factor)[..., : packed.k]
    codes = codes_of(packed.weight)
    assert packed.scale is not None
    if kind.code == "int4":
        values = ((codes.to(torch.int8) ^ 8) - 8).double()
        scale = packed.scale.double()
    else:
        values = e2m1.values_of(codes).double() * 2.0**-E2M1_SHIFT
        if kind.scales == "e8m0":
            scale = torch.exp2(packed.scale.double() - _BIAS - 100)
        else:
            scale = packed.scale.view(torch.float8_e4m3fn).double()
    values = values * scale.repeat_interleave(kind.group, -1)[..., : values.shape[-1]]
    return (values * factor)[..., : packed.k]


def _spread_blocks(packed: Packed, scale: torch.Tensor, width: int) -> torch.Tensor:
    rows = torch.arange(packed.n, device=scale.device)
    blocks = rows // 2 // BLOCK * 2 + rows % 2 if packed.gated else rows // BLOCK
    return scale[:, blocks].repeat_interleave(BLOCK, -1)[..., :width]
