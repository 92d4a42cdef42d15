"""The kernels with the constants that they are compiled for: what ``aot.py`` goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from toolchain.kernels.kinds import KINDS, NATIVE_FP4, W4A4, Kind
from toolchain.kernels.settings import Shape, default

FP8_SINCE = 89


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
    runs_on: Callable[[int], bool] = lambda sm: True
    """Whether it is ever run on a GPU of that compute capability times ten."""
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 in every real model: loads may be as wide as 16 bytes."""


def variants() -> Iterator[Variant]:
    """Every kernel; the product of every kind with the default blocks of one token and of 4096, routed with
    SiLU-mul and with routing weights; with those of one token also as a Linear with sizes that divide nothing, and with
    the biases, activation and width of gpt-oss (2880)."""
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
            made = Variant(
                name=f"{kind.format} {code} {'gate_up' if gated else 'down'} {blocks}",
                function=block_scaled.scaled_matmul if native else matmul.packed_matmul,
                pointers={name: to for name, to in own.items() if to},
                scalars={**dict.fromkeys(SIZES, "i32"), "alpha": "fp32", "limit": "fp32"},
                constants=constants,
                warps=settings.warps,
                stages=settings.stages,
                runs_on=_runs_on(code),
                divisible=("N", "K", "x_stride", "weight_stride", "expert_stride", "out_stride"),
            )
            yield made
            if gated:
                name = f"{kind.format} {code} {{}} {blocks}"
                linear = _with(
                    made, name.format("linear"), ROUTED=False, X_DIV=1, ACTIVATION="none", SPLIT_K=1, EVEN_K=False,
                    **dict.fromkeys(("order", "block_expert", "block_begin", "block_rows")),
                )  # fmt: skip
                yield replace(linear, divisible=())
                clamped = _with(
                    made, name.format("clamped"), BIAS=True, ACTIVATION="clamped", SPLIT_K=1, EVEN_K=False
                )
                constants = {name: value for name, value in clamped.constants.items() if name != "bias"}
                yield replace(clamped, pointers={**clamped.pointers, "bias": "fp32"}, constants=constants)


def _runs_on(code: str) -> Callable[[int], bool]:
    if code == "e2m1x":
        return lambda sm: divmod(sm, 10) in NATIVE_FP4
    if code == "e4m3x":
        return lambda sm: sm >= FP8_SINCE
    return (lambda sm: sm < FP8_SINCE) if code == "e4m3" else lambda sm: True


def _with(variant: Variant, name: str, **constants: Any) -> Variant:
    """``variant`` with other constants, None for pointers that are not given."""
    pointers = {key: to for key, to in variant.pointers.items() if key not in constants}
    return replace(variant, name=name, pointers=pointers, constants={**variant.constants, **constants})


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
    choose = plain(
        "choose", routing.choose, {"logits": "fp32", "bias": "fp32", "ids": "i32", "weights": "fp32"},
        SCORING="sigmoid", BIAS=True, TOP_K=8, GROUPS=8, TOP_GROUPS=4, BEST_OF_GROUP=2, NORMALIZE=True, EPSILON=1e-20,
        BLOCK_E=256,
    )  # fmt: skip
    yield choose
    for scoring in ("softmax", "chosen"):
        alone = {"GROUPS": 1, "TOP_GROUPS": 1, "BEST_OF_GROUP": 1, "NORMALIZE": False}
        yield _with(choose, f"choose {scoring}", SCORING=scoring, bias=None, BIAS=False, BLOCK_E=128, **alone)
    yield plain("count", routing.count, i32(("ids", "counts"), "i32"), BLOCK=256)
    names = ("counts", "cursors", "block_expert", "block_begin", "block_rows")
    yield plain("divide", routing.divide, i32(names, "i32"), BLOCK_M=64, BLOCK_E=256)
    yield plain("place", routing.place, i32(("ids", "cursors", "order"), "i32"), BLOCK=256)
    yield plain(
        "combine", routing.combine, {"outputs": "bf16", "ids": "i32", "result": "bf16"}, TOP_K=8, BLOCK=1024
    )
    finish = plain(
        "finish", epilogue.finish,
        {"partial": "fp32", "bias": "fp32", "routing": "fp32", "experts": "i32", "out": "bf16"},
        ROUTED=True, BIAS=True, ACTIVATION="silu", WEIGHTED=True, SPLIT_K=4, BLOCK=512,
    )  # fmt: skip
    yield finish
    yield _with(
        finish, "finish linear", bias=None, routing=None, experts=None, ROUTED=False, BIAS=False, WEIGHTED=False,
        ACTIVATION="none",
    )  # fmt: skip
    yield plain(
        "unsort", epilogue.unsort,
        {"sums": "bf16", "order": "i32", "ends": "i32", "ids": "i32", "bias": "fp32", "routing": "fp32", "out": "bf16"},
        BIAS=True, ACTIVATION="silu", WEIGHTED=True, BLOCK=512,
    )  # fmt: skip
    yield from _attention()
    for mode in ("tensor", "token", "group"):
        made = plain(
            f"round_e4m3 {mode}", rounding.round_e4m3,
            {"x": "bf16", "rows_of": "i32", "given": "fp32", "out": "u8", "out_scale": "fp32"},
            X_DIV=8, MODE=mode, ROWS_OF=True, BLOCK=2048,
        )  # fmt: skip
        given = {} if mode == "tensor" else {"given": None}
        made = _with(made, made.name, **given)
        yield made
        yield _with(made, f"{made.name} linear", rows_of=None, ROWS_OF=False, X_DIV=1)
    native = plain(
        "round_nvfp4", rounding.round_nvfp4,
        {"x": "bf16", "rows_of": "i32", "given": "fp32", "out": "u8", "out_scale": "u8"},
        X_DIV=8, ROWS_OF=True, BLOCK=1024,
    )  # fmt: skip
    yield native
    yield _with(native, "round_nvfp4 linear", rows_of=None, ROWS_OF=False, X_DIV=1)


def _attention() -> Iterator[Variant]:
    """Of Qwen3-30B-A3B: 32 heads of queries over 4 of keys, 128 wide; of gpt-oss with its window, of DeepSeek."""
    from toolchain.kernels import attention

    strides = (
        *("query_row_stride", "query_head_stride", "page_stride", "position_stride", "head_stride"),
        *("value_page_stride", "value_position_stride", "value_head_stride", "table_stride", "heads"),
    )
    for fp8 in (False, True):
        held = "u8" if fp8 else "bf16"
        made = Variant(
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
        yield made
        yield _with(made, f"{made.name} window", WINDOW=128, DK=64, BLOCK_DK=64, DV=64, BLOCK_DV=64)
        yield _with(made, f"{made.name} MLA", GROUP=1, DK=192, BLOCK_DK=256)
    yield Variant(
        name="merge",
        function=attention.merge,
        pointers={"sums": "fp32", "tops": "fp32", "weights": "fp32", "sinks": "bf16", "out": "bf16"},
        scalars={"heads": "i32", "value_scale": "fp32"},
        constants={"SINKS": True, "DV": 128, "BLOCK_DV": 128, "SPLITS": 8},
        warps=2,
    )
