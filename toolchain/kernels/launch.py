"""The kernels as functions of torch tensors. Importing this needs triton; calling it, a GPU or triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from toolchain.kernels import block_scaled, epilogue, matmul, rounding, routing
from toolchain.kernels.kinds import Kind
from toolchain.kernels.packing import Packed
from toolchain.kernels.settings import Settings
from toolchain.kernels.torch_grouped import multiply_by_torch

WIDE: bool = bool(triton.knobs.runtime.interpret)
"""In Triton's interpreter, which knows no bfloat16 arithmetic: float32 instead."""
LONE_PAIRS = 32
"""Up to so many pairs of token and expert each pair is a block: sorting would cost more than reading weights again."""
NATIVE_FP8 = (8, 9)
"""Compute capability from which tensor cores multiply E4M3."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """Between gate and up: SiLU(gate) * up, or gpt-oss's with its two constants."""

    clamped: bool = False
    alpha: float = 1.0
    limit: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Route:
    """Pairs (token, choice) sorted by expert, in blocks of one expert each."""

    ids: torch.Tensor
    """int32 [pairs]: expert of each pair; beyond the experts: of none."""
    top_k: int
    order: torch.Tensor
    block_expert: torch.Tensor
    block_begin: torch.Tensor
    block_rows: torch.Tensor
    block_m: int
    counts: torch.Tensor | None = None
    """int32 [experts]: pairs of each; None where they are not sorted."""

    @property
    def pairs(self) -> int:
        return self.ids.numel()

    @property
    def blocks(self) -> int:
        return self.block_expert.numel()


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Inputs in E4M3 or NVFP4."""

    values: torch.Tensor
    """uint8 [rows, K], bits of E4M3; or [rows, K / 2], codes of E2M1, even elements low."""
    scale: torch.Tensor
    """float32 [rows], or [rows, ceil(K / 128)]; or uint8 [rows, K / 16], bits of E4M3."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a router makes experts and weights of its logits; see ``routing.choose``."""

    scoring: str
    top_k: int
    normalize: bool = False
    epsilon: float = 0.0
    factor: float = 1.0
    groups: int = 1
    top_groups: int = 1
    best_of_group: int = 1


def choose_experts(
    logits: torch.Tensor, scoring: Scoring, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> ids int32 [T, k] and weights float32 [T, k]."""
    tokens, experts = logits.shape
    ids = torch.empty((tokens, scoring.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, scoring.top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        routing.choose[(tokens,)](
            logits,
            bias,
            ids,
            weights,
            experts,
            logits.stride(0),
            scoring.factor,
            SCORING=scoring.scoring,
            BIAS=bias is not None,
            TOP_K=scoring.top_k,
            GROUPS=scoring.groups,
            TOP_GROUPS=scoring.top_groups,
            BEST_OF_GROUP=scoring.best_of_group,
            NORMALIZE=scoring.normalize,
            EPSILON=scoring.epsilon,
            BLOCK_E=triton.next_power_of_2(experts),
            num_warps=1 if experts <= 128 else 4,
        )
    return ids, weights


def make_route(ids: torch.Tensor, experts: int, block_m: int) -> Route:
    """ids [T, k] -> Route with blocks of at most ``block_m`` pairs. Nothing is read back from the GPU."""
    top_k = ids.shape[-1]
    flat = ids.reshape(-1).to(torch.int32)
    if flat.numel() <= LONE_PAIRS:
        return _lone_route(flat, experts, top_k, block_m)
    pairs, device = flat.numel(), flat.device
    most = min(pairs, pairs // block_m + min(experts, pairs))

    def empty(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    cursors, order = empty(experts), torch.zeros_like(flat)
    route = Route(
        ids=flat,
        top_k=top_k,
        order=order,
        block_expert=empty(most),
        block_begin=empty(most),
        block_rows=empty(most),
        block_m=block_m,
        counts=counts,
    )
    size = 256
    grid = (triton.cdiv(pairs, size),)
    routing.count[grid](flat, counts, pairs, experts, BLOCK=size)
    routing.divide[(most,)](
        counts,
        cursors,
        route.block_expert,
        route.block_begin,
        route.block_rows,
        experts,
        BLOCK_M=block_m,
        BLOCK_E=triton.next_power_of_2(experts),
    )
    routing.place[grid](flat, cursors, order, pairs, experts, BLOCK=size)
    return route


def _lone_route(flat: torch.Tensor, experts: int, top_k: int, block_m: int) -> Route:
    """Every pair is a block of its own."""
    order = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    return Route(
        ids=flat,
        top_k=top_k,
        order=order,
        block_expert=torch.where((flat >= 0) & (flat < experts), flat, -1),
        block_begin=order,
        block_rows=torch.ones_like(order),
        block_m=block_m,
    )


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


def combine(outputs: torch.Tensor, ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Weighted outputs of pairs [T * k, H] with ids [T, k] -> their sums [T, H]."""
    tokens, top_k = ids.shape
    width = outputs.shape[1]
    result = torch.empty((tokens, width), dtype=outputs.dtype, device=outputs.device)
    if tokens:
        block = min(triton.next_power_of_2(width), 1024)
        routing.combine[(tokens, triton.cdiv(width, block))](
            outputs, ids.to(torch.int32), result, experts, width, TOP_K=top_k, BLOCK=block
        )
    return result


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
