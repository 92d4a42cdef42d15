"""The kernels with the constants that they are compiled for: what ``aot.py`` goes through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.kernels.kinds import KINDS, W4A4, Kind
from toolchain.kernels.settings import Shape, default

FP8_SINCE = 89
SCALED_DOT_SINCE = 100


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel with the constants that it is compiled for."""

    name: str
    function: Any
    pointers: dict[str, str]
    """Argument -> type of what it points to; None where it is not given."""
    scalars: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    oldest: int = 80
    newest: int = 999
    only: tuple[int, ...] = ()
    """Where given, no others between these."""
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 in every real model: loads may be as wide as 16 bytes."""


def variants() -> Iterator[Variant]:
    """Every kernel; the product of every kind with the default blocks of one token and of 4096, once with each
    epilogue."""
    for kind in (*KINDS.values(), W4A4):
        if kind.format in ("w4a16_nvfp4", "int4_gptq"):
            continue  # the same machine code as nvfp4 and int4_awq
        yield from _products(kind)
    yield from _others()


POINTERS = {
    "x": "bf16",
    "x_scale": "fp32",
    "weight": "u8",
    "scale": "fp32",
    "factor": "fp32",
    "bias": None,
    "channel": "bf16",
    "routing": "fp32",
    **dict.fromkeys(("order", "block_expert", "block_begin", "block_rows"), "i32"),
    "out": "bf16",
}
SIZES = (
    *("rows", "N", "K", "x_stride", "x_scale_stride", "weight_stride", "expert_stride", "scale_stride"),
    *("expert_scale_stride", "out_stride"),
)
PROCESSORS = 132


def _products(kind: Kind) -> Iterator[Variant]:
    """Layers of Qwen3-30B-A3B: 128 experts, 8 of them for a token, 2048 wide, 768 inside."""
    from toolchain.kernels import block_scaled, matmul

    native = kind.rounding == "nvfp4"
    rounded = kind.rounding != "none"
    given = dict(POINTERS)
    given["x"] = "u8" if rounded else "bf16"
    given["x_scale"] = ("u8" if native else "fp32") if rounded else None
    scales = {
        "e4m3": "u8" if native else "i16",
        "e8m0": "u8",
        "float32": "fp32",
        "block": "fp32",
        "none": None,
    }
    given["scale"] = scales[kind.scales]
    given["channel"] = "bf16" if kind.channel else None
    for code in ["e4m3", "e4m3x"] if kind.code == "e4m3" else [kind.code]:
        for tokens, gated in ((1, True), (4096, False)):
            n, k = (1536, 2048) if gated else (2048, 768)
            settings = default(
                Shape(kind=kind, n=n, k=k, experts=128, top_k=8, gated=gated), tokens, PROCESSORS
            )
            own = {**given, "routing": None if gated else "fp32"}
            constants: dict[str, Any] = {
                **{name: None for name, to in own.items() if not to},
                "ROUTED": True, "X_DIV": 8 if gated else 1, "BIAS": False, "ACTIVATION": "silu" if gated else "none",
                "WEIGHTED": not gated, "SPLIT_K": settings.split_k, "EVEN_K": True, "BLOCK_M": settings.block_m,
                "BLOCK_N": settings.block_n, "BLOCK_K": settings.block_k, "GROUP_M": settings.group_m, "WIDE": False,
            }  # fmt: skip
            if not native:
                constants |= {
                    "CODE": code, "SCALES": kind.scales, "GROUP": kind.group, "ROUNDED": rounded, "GATED": gated,
                    "X_SCALE_GROUPS": kind.rounding == "group", "CHANNEL": kind.channel,
                }  # fmt: skip
            blocks = f"{settings.block_m}x{settings.block_n}x{settings.block_k}"
            yield Variant(
                name=f"{kind.format} {code} {'gate_up' if gated else 'down'} {blocks}",
                function=block_scaled.scaled_matmul if native else matmul.packed_matmul,
                pointers={name: to for name, to in own.items() if to},
                scalars={**dict.fromkeys(SIZES, "i32"), "alpha": "fp32", "limit": "fp32"},
                constants=constants,
                warps=settings.warps,
                stages=settings.stages,
                oldest=SCALED_DOT_SINCE if native else FP8_SINCE if code == "e4m3x" else 80,
                newest=FP8_SINCE if code == "e4m3" else 999,
                divisible=("N", "K", "x_stride", "weight_stride", "expert_stride", "out_stride"),
            )


def _others() -> Iterator[Variant]:
    from toolchain.kernels import epilogue, rounding, routing

    integers = dict.fromkeys(
        ("E", "H", "K", "N", "pairs", "rows", "x_stride", "logits_stride", "out_stride"), "i32"
    )
    floats = dict.fromkeys(("factor", "alpha", "limit"), "fp32")
    scalars = {**integers, **floats}

    def plain(name: str, function: Any, pointers: dict[str, str], **constants: Any) -> Variant:
        return Variant(
            name=name,
            function=function,
            pointers=pointers,
            scalars=scalars,
            constants=constants,
            divisible=("H", "K", "N"),
        )

    i32 = dict.fromkeys
    yield plain(
        "choose", routing.choose, {"logits": "fp32", "bias": "fp32", "ids": "i32", "weights": "fp32"},
        SCORING="sigmoid", BIAS=True, TOP_K=8, GROUPS=8, TOP_GROUPS=4, BEST_OF_GROUP=2, NORMALIZE=True, EPSILON=1e-20,
        BLOCK_E=256,
    )  # fmt: skip
    yield plain("count", routing.count, i32(("ids", "counts"), "i32"), BLOCK=256)
    names = ("counts", "cursors", "block_expert", "block_begin", "block_rows")
    yield plain("divide", routing.divide, i32(names, "i32"), BLOCK_M=64, BLOCK_E=256)
    yield plain("place", routing.place, i32(("ids", "cursors", "order"), "i32"), BLOCK=256)
    yield plain(
        "combine", routing.combine, {"outputs": "bf16", "ids": "i32", "result": "bf16"}, TOP_K=8, BLOCK=1024
    )
    yield plain(
        "finish", epilogue.finish,
        {"partial": "fp32", "bias": "fp32", "routing": "fp32", "experts": "i32", "out": "bf16"},
        ROUTED=True, BIAS=True, ACTIVATION="silu", WEIGHTED=True, SPLIT_K=4, BLOCK=512,
    )  # fmt: skip
    yield plain(
        "unsort", epilogue.unsort,
        {"sums": "bf16", "order": "i32", "ends": "i32", "ids": "i32", "bias": "fp32", "routing": "fp32", "out": "bf16"},
        BIAS=True, ACTIVATION="silu", WEIGHTED=True, BLOCK=512,
    )  # fmt: skip
    yield from _attention()
    for mode in ("tensor", "token", "group"):
        yield plain(
            f"round_e4m3 {mode}", rounding.round_e4m3,
            {"x": "bf16", "rows_of": "i32", "given": "fp32", "out": "u8", "out_scale": "fp32"},
            X_DIV=8, MODE=mode, ROWS_OF=mode == "tensor", BLOCK=2048,
        )  # fmt: skip
    yield plain(
        "round_nvfp4", rounding.round_nvfp4,
        {"x": "bf16", "rows_of": "i32", "given": "fp32", "out": "u8", "out_scale": "u8"},
        X_DIV=8, ROWS_OF=True, BLOCK=1024,
    )  # fmt: skip


def _attention() -> Iterator[Variant]:
    """Of Qwen3-30B-A3B: 32 heads of queries over 4 of keys, 128 wide."""
    from toolchain.kernels import attention

    strides = (
        *("query_row_stride", "query_head_stride", "page_stride", "position_stride", "head_stride"),
        *("value_page_stride", "value_position_stride", "value_head_stride", "table_stride", "heads"),
    )
    for fp8 in (False, True):
        held = "u8" if fp8 else "bf16"
        yield Variant(
            name=f"attend {'FP8' if fp8 else 'BF16'}",
            function=attention.attend,
            pointers={
                "query": "bf16", "keys": held, "values": held, "table": "i32", "slots": "i32", "lengths": "i32",
                "sums": "fp32", "tops": "fp32", "weights": "fp32",
            },
            scalars={**dict.fromkeys(strides, "i32"), "scaling": "fp32", "key_scale": "fp32"},
            constants={
                "WINDOW": 0, "GROUP": 8, "BLOCK_G": 16, "DK": 128, "BLOCK_DK": 128, "DV": 128, "BLOCK_DV": 128,
                "PAGE": 64, "SPLITS": 8, "FP8": fp8, "WIDE": False,
            },
            stages=2,
            divisible=strides[:-2],
        )  # fmt: skip
    yield Variant(
        name="merge",
        function=attention.merge,
        pointers={"sums": "fp32", "tops": "fp32", "weights": "fp32", "sinks": "bf16", "out": "bf16"},
        scalars={"heads": "i32", "value_scale": "fp32"},
        constants={"SINKS": True, "DV": 128, "BLOCK_DV": 128, "SPLITS": 8},
        warps=2,
    )
