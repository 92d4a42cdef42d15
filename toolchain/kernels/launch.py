"""The kernels as functions of torch tensors. Importing this needs triton; calling it, a GPU or triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from toolchain.kernels import block_scaled, epilogue, matmul, rounding
from toolchain.kernels.kinds import Kind
from toolchain.kernels.packing import Packed
from toolchain.kernels.settings import Settings
from toolchain.kernels.sorting import Route
from toolchain.kernels.torch_grouped import multiply_by_torch

WIDE: bool = bool(triton.knobs.runtime.interpret)
"""In Triton's interpreter, which knows no bfloat16 arithmetic: float32 instead."""
NATIVE_FP8 = (8, 9)
"""Compute capability from which tensor cores multiply E4M3."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """Between gate and up: SiLU(gate) * up, or gpt-oss's with its two constants."""

    clamped: bool = False
    alpha: float = 1.0
    limit: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Inputs in E4M3 or NVFP4."""

    values: torch.Tensor
    """uint8 [rows, K], bits of E4M3; or [rows, K / 2], codes of E2M1, even elements low."""
    scale: torch.Tensor
    """float32 [rows], or [rows, ceil(K / 128)]; or uint8 [rows, K / 16], bits of E4M3."""


def native_fp8(device: torch.device) -> bool:
    """Whether E4M3 can be multiplied without decoding it."""
    return not WIDE and device.type == "cuda" and torch.cuda.get_device_capability(device) >= NATIVE_FP8


def round_inputs(
    x: torch.Tensor,
    kind: Kind,
    input_scale: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    top_k: int = 1,
) -> Rounded:
    """x [rows, K] -> E4M3 as ``kind`` has it. With ``ids`` [pairs] a row for each pair, under its expert's scale."""
    if kind.rounding == "nvfp4":
        assert input_scale is not None
        codes, scales = round_nvfp4(x, input_scale, ids, top_k)
        return Rounded(values=codes, scale=scales)
    rows = x.shape[0] if ids is None else ids.numel()
    k = x.shape[1]
    groups = -(-k // 128)
    values = torch.empty((rows, k), dtype=torch.uint8, device=x.device)
    shape = (rows, groups) if kind.rounding == "group" else (rows,)
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    if rows:
        rounding.round_e4m3[(rows, groups if kind.rounding == "group" else 1)](
            x,
            ids,
            input_scale,
            values,
            scale,
            k,
            input_scale.numel() if input_scale is not None else 0,
            x.stride(0),
            X_DIV=1 if ids is None else top_k,
            MODE=kind.rounding,
            ROWS_OF=ids is not None,
            BLOCK=min(triton.next_power_of_2(k), 2048),
        )
    return Rounded(values=values, scale=scale)


def multiply(
    packed: Packed,
    x: torch.Tensor | Rounded,
    settings: Settings,
    *,
    out_dtype: torch.dtype,
    route: Route | None = None,
    x_div: int = 1,
    activation: Activation | None = None,
    weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, N], or [rows, N / 2] behind ``activation``: rows of x, or with ``route`` of its pairs.

    Pair p reads row p // ``x_div`` of x. ``weights`` float32 [pairs]: routing weights, multiplied in float32. Rows of
    pairs of no expert are left as ``out`` had them.
    """
    rounded = isinstance(x, Rounded)
    values = x.values if isinstance(x, Rounded) else x
    rows = route.pairs if route is not None else values.shape[0]
    n_out = packed.n // 2 if activation else packed.n
    if out is None:
        out = torch.empty((rows, n_out), dtype=out_dtype, device=values.device)
    if not rows:
        return out
    kind = packed.kind
    if settings.by_torch and route is not None and route.counts is not None and isinstance(x, Rounded):
        return multiply_by_torch(
            packed, x, route, out=out, x_div=x_div, activation=activation, weights=weights
        )
    code = "e4m3x" if kind.code == "e4m3" and rounded and native_fp8(values.device) else kind.code
    scale = packed.scale
    if kind.code == "e2m1" and kind.scales == "e4m3" and scale is not None:
        scale = scale.view(torch.int16)
    split = settings.split_k
    target = out
    if split > 1:
        target = torch.empty((split, rows, packed.n), dtype=torch.float32, device=values.device)
    blocks_m = route.blocks if route is not None else triton.cdiv(rows, settings.block_m)
    act = activation or Activation()
    name = "none" if activation is None else "clamped" if act.clamped else "silu"
    blocks = (route.order, route.block_expert, route.block_begin, route.block_rows) if route else (None,) * 4
    sizes = (
        rows,
        packed.n,
        packed.k,
        values.stride(0),
        x.scale.stride(0) if isinstance(x, Rounded) else 0,
        packed.weight.stride(1),
        packed.weight.stride(0),
        scale.stride(1) if scale is not None else 0,
        scale.stride(0) if scale is not None else 0,
        out.stride(0),
        act.alpha,
        act.limit,
    )
    constants = {
        "ROUTED": route is not None,
        "X_DIV": x_div,
        "BIAS": packed.bias is not None,
        "ACTIVATION": name,
        "WEIGHTED": weights is not None,
        "SPLIT_K": split,
        "EVEN_K": packed.k % settings.block_k == 0,
        "BLOCK_M": settings.block_m,
        "BLOCK_N": settings.block_n,
        "BLOCK_K": settings.block_k,
        "GROUP_M": settings.group_m,
        "WIDE": WIDE,
        "num_warps": settings.warps,
        "num_stages": settings.stages,
    }
    grid = (blocks_m * triton.cdiv(packed.n, settings.block_n), split)
    x_scale = x.scale if isinstance(x, Rounded) else None
    weight = (packed.weight, scale, packed.factor, packed.bias)
    if kind.rounding == "nvfp4":
        block_scaled.scaled_matmul[grid](
            values, x_scale, *weight, weights, *blocks, target, *sizes, **constants
        )
    else:
        matmul.packed_matmul[grid](
            values,
            x_scale,
            *weight,
            packed.channel,
            weights,
            *blocks,
            target,
            *sizes,
            CODE=code,
            SCALES=kind.scales,
            GROUP=kind.group,
            ROUNDED=rounded,
            X_SCALE_GROUPS=rounded and kind.rounding == "group",
            CHANNEL=packed.channel is not None,
            GATED=packed.gated,
            **constants,
        )
    if split > 1:
        block = min(triton.next_power_of_2(n_out), 512)
        epilogue.finish[(rows, triton.cdiv(n_out, block))](
            target,
            packed.bias,
            weights,
            route.ids if route is not None else None,
            out,
            rows,
            packed.n,
            out.stride(0),
            act.alpha,
            act.limit,
            packed.experts,
            ROUTED=route is not None,
            BIAS=packed.bias is not None,
            ACTIVATION=name,
            WEIGHTED=weights is not None,
            SPLIT_K=split,
            BLOCK=block,
        )
    return out


def round_nvfp4(
    x: torch.Tensor, input_scale: torch.Tensor, ids: torch.Tensor | None = None, top_k: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, K] -> E2M1 codes uint8 [rows, K / 2], even elements low, and E4M3 block scales uint8 [rows, K / 16].

    Under the static ``input_scale`` [E]. With ``ids`` [pairs] a row for each pair, under its expert's scale."""
    rows = x.shape[0] if ids is None else ids.numel()
    k = x.shape[1]
    codes = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, k // 16), dtype=torch.uint8, device=x.device)
    if rows:
        block = min(triton.next_power_of_2(k), 1024)
        rounding.round_nvfp4[(rows, triton.cdiv(k, block))](
            x,
            ids,
            input_scale,
            codes,
            scales,
            k,
            input_scale.numel(),
            x.stride(0),
            X_DIV=1 if ids is None else top_k,
            ROWS_OF=ids is not None,
            BLOCK=block,
        )
    return codes, scales
