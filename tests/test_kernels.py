"""The dequantizing product in Triton's interpreter, against the codecs' own unpacking and float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernel_cases import Case, make
from toolchain.codecs import e2m1, get_codec
from toolchain.kernels.kinds import KINDS, W4A4
from toolchain.kernels.launch import Activation, Rounded, multiply, round_inputs
from toolchain.kernels.packing import unpacked
from toolchain.kernels.settings import Settings
from toolchain.kernels.sorting import combine, make_route

SETTINGS = Settings(block_m=16, block_n=32, block_k=64)
TALL = Settings(block_m=32, block_n=64, block_k=128)


def inputs(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor) -> None:
    """float32 sums in another order: a few units of float32 of the sum of magnitudes."""
    error = (actual.double() - expected).abs()
    assert (error <= 4e-6 * terms + 1e-30).all(), f"off by {(error / terms.clamp(min=1e-30)).max():.2e}"


def rounded_or_not(case: Case, x: torch.Tensor) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
    """What the kernel gets, and what it stands for."""
    kind = case.packed.kind
    if kind.rounding == "none":
        value = x.double()
        if case.packed.channel is not None:
            value = (x.float() * case.packed.channel[0].float()).double()
        return x, value
    scale = case.packed.input_scale
    tensors = {"input_scale": scale[0]} if scale is not None else {}
    codec = get_codec(kind.format)
    return round_inputs(x, kind, scale), codec.quantize_input(x.float(), tensors).double()


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_packing_keeps_the_bits(format: str, gated: bool) -> None:
    case = make(format, experts=3, n=68, k=256, gated=gated)
    assert torch.allclose(unpacked(case.packed), case.weights, rtol=2e-7, atol=0)


DISTINCT = [name for name in KINDS if name not in ("w4a16_nvfp4", "int4_gptq")]
"""Those are stored as nvfp4 and int4_awq are."""


@pytest.mark.parametrize("format", DISTINCT)
@pytest.mark.parametrize(("rows", "settings"), [(1, SETTINGS), (33, SETTINGS), (5, TALL)])
def test_one_matrix(format: str, rows: int, settings: Settings) -> None:
    """Odd numbers of rows, neither of them a multiple of a block."""
    case = make(format, experts=1, n=86, k=384)
    x = inputs(rows, 384)
    given, value = rounded_or_not(case, x)
    out = multiply(case.packed, given, settings, out_dtype=torch.float32)
    assert_near(out, value @ case.weights[0].T, value.abs() @ case.weights[0].abs().T)


WIDTHS = {
    "nvfp4": 80,
    "w4a16_nvfp4": 48,
    "mxfp4": 96,
    "fp8": 70,
    "fp8_per_channel_per_token": 33,
    "fp8_block": 200,
}
"""Columns that are no multiple of any block; INT4 has whole groups of 128."""


@pytest.mark.parametrize("format", WIDTHS)
@pytest.mark.parametrize("block_k", [32, 64, 128])
def test_odd_widths(format: str, block_k: int) -> None:
    k = WIDTHS[format]
    case = make(format, experts=1, n=37, k=k)
    given, value = rounded_or_not(case, inputs(3, k))
    settings = Settings(block_m=16, block_n=16, block_k=block_k)
    out = multiply(case.packed, given, settings, out_dtype=torch.float32)
    assert_near(out, value @ case.weights[0].T, value.abs() @ case.weights[0].abs().T)


@pytest.mark.parametrize("format", ["nvfp4", "int4_gptq", "fp8_block"])
@pytest.mark.parametrize("split", [2, 3])
def test_shared_sums(format: str, split: int) -> None:
    """Several programs for one block: with bias and activation behind the sum."""
    case = make(format, experts=1, n=64, k=640, gated=True, bias=True)
    assert case.packed.bias is not None
    given, value = rounded_or_not(case, inputs(2, 640))
    settings = Settings(block_m=16, block_n=32, block_k=128, split_k=split)
    out = multiply(case.packed, given, settings, out_dtype=torch.float32, activation=Activation())
    sums = (value @ case.weights[0].T + case.packed.bias[0].double()).unflatten(1, (-1, 2))
    expected = torch.nn.functional.silu(sums[..., 0]) * sums[..., 1]
    assert torch.allclose(out.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("n", "k", "block_k"), [(86, 256, 128), (40, 80, 64), (32, 144, 256)])
@pytest.mark.parametrize("split", [1, 2])
def test_nvfp4_times_nvfp4(n: int, k: int, block_k: int, split: int) -> None:
    """Blackwell's product, both sides in four bits."""
    case = make("nvfp4", experts=1, n=n, k=k, kind=W4A4)
    assert case.packed.input_scale is not None
    assert torch.allclose(unpacked(case.packed), case.weights, rtol=1e-6, atol=0)
    x = inputs(5, k).float()
    value = get_codec("nvfp4").quantize_input(x, {"input_scale": case.packed.input_scale[0]}).double()
    settings = Settings(block_m=16, block_n=32, block_k=block_k, split_k=split)
    given = round_inputs(x, W4A4, case.packed.input_scale)
    out = multiply(case.packed, given, settings, out_dtype=torch.float32)
    assert_near(out, value @ case.weights[0].T, value.abs() @ case.weights[0].abs().T)


@pytest.mark.parametrize("route", ["one token", "sorted", "no expert"])
def test_experts_in_nvfp4_times_nvfp4(route: str) -> None:
    ids = ROUTES[route]()
    gate_up = make("nvfp4", experts=6, n=128, k=128, gated=True, kind=W4A4)
    down = make("nvfp4", experts=6, n=128, k=64, kind=W4A4)
    x = inputs(len(ids), 128, seed=9)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    actual = fused_moe(gate_up, down, x.float(), ids, weights, Activation())
    expected = reference_moe(gate_up, down, x, ids, weights, Activation())
    assert (actual.double() - expected).abs().max() <= 0.02 * expected.abs().max()


def test_poisoned_output_is_written_everywhere() -> None:
    case = make("nvfp4", experts=1, n=50, k=64)
    out = torch.full((7, 50), float("nan"))
    multiply(case.packed, inputs(7, 64), SETTINGS, out_dtype=torch.float32, out=out)
    assert torch.isfinite(out).all()


def reference_moe(
    gate_up: Case,
    down: Case,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """One expert after the other, in float64, with the codecs' rounding of inputs."""
    output = torch.zeros(x.shape, dtype=torch.float64)
    for token, chosen in enumerate(ids.tolist()):
        for slot, expert in enumerate(chosen):
            if not 0 <= expert < gate_up.packed.experts:
                continue
            hidden = seen_by(gate_up, expert, x[token]) @ gate_up.weights[expert].T
            if gate_up.packed.bias is not None:
                hidden = hidden + gate_up.packed.bias[expert].double()
            gate, up = hidden[0::2], hidden[1::2]
            if activation.clamped:
                gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
                hidden = (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
            else:
                hidden = torch.nn.functional.silu(gate) * up
            result = seen_by(down, expert, hidden.float()) @ down.weights[expert].T
            if down.packed.bias is not None:
                result = result + down.packed.bias[expert].double()
            output[token] += result * weights[token, slot].double()
    return output


def seen_by(case: Case, expert: int, x: torch.Tensor) -> torch.Tensor:
    kind = case.packed.kind
    x = x.float()
    if case.packed.channel is not None:
        x = x * case.packed.channel[expert].float()
    if kind.rounding == "none":
        return x.double()
    tensors = {"input_scale": case.packed.input_scale[expert]} if case.packed.input_scale is not None else {}
    return get_codec(kind.format).quantize_input(x, tensors).double()


def fused_moe(
    gate_up: Case,
    down: Case,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    experts, kind = gate_up.packed.experts, gate_up.packed.kind
    route = make_route(ids, experts, SETTINGS.block_m)
    top_k = ids.shape[1]
    first: torch.Tensor | Rounded = x
    div = top_k
    if kind.rounding != "none":
        per_pair = kind.rounding in ("tensor", "nvfp4")
        first = round_inputs(x, kind, gate_up.packed.input_scale, route.ids if per_pair else None, top_k)
        div = 1 if per_pair else top_k
    hidden = multiply(
        gate_up.packed,
        first,
        SETTINGS,
        out_dtype=torch.float32,
        route=route,
        x_div=div,
        activation=activation,
    )
    second: torch.Tensor | Rounded = hidden
    if kind.rounding != "none":
        ids_of = route.ids if kind.rounding in ("tensor", "nvfp4") else None
        second = round_inputs(torch.nan_to_num(hidden), kind, down.packed.input_scale, ids_of)
    pairs = multiply(
        down.packed,
        second,
        SETTINGS,
        out_dtype=torch.float32,
        route=route,
        weights=weights.reshape(-1).float(),
    )
    return combine(pairs, ids, experts)


def everyone(tokens: int, experts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])


ROUTES = {
    "one token": lambda: everyone(1, 6, 0),
    "sorted": lambda: everyone(40, 6, 1),
    "one expert": lambda: torch.full((21, 1), 4),
    "empty experts": lambda: everyone(30, 6, 2) // 3 * 3,
    "no expert": lambda: torch.where(everyone(20, 6, 3) == 2, 6, everyone(20, 6, 3)),
}


@pytest.mark.parametrize("format", DISTINCT)
@pytest.mark.parametrize("route", ROUTES)
def test_experts(format: str, route: str) -> None:
    ids = ROUTES[route]()
    gate_up = make(format, experts=6, n=256, k=128, gated=True)
    down = make(format, experts=6, n=128, k=128)
    x = inputs(len(ids), 128, seed=9)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    actual = fused_moe(gate_up, down, x.float(), ids, weights, Activation())
    expected = reference_moe(gate_up, down, x, ids, weights, Activation())
    tolerance = 1e-5 if KINDS[format].rounding == "none" else 0.02  # a tie of E4M3 may fall the other way
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_clamped_experts_with_biases(format: str) -> None:
    """gpt-oss's."""
    ids = everyone(12, 4, 5)
    activation = Activation(clamped=True, alpha=1.702, limit=7.0)
    gate_up = make(format, experts=4, n=128, k=96, gated=True, bias=True)
    down = make(format, experts=4, n=96, k=64, bias=True)
    x = inputs(12, 96)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    actual = fused_moe(gate_up, down, x.float(), ids, weights, activation)
    expected = reference_moe(gate_up, down, x, ids, weights, activation)
    assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_tokens() -> None:
    gate_up = make("nvfp4", experts=2, n=32, k=32, gated=True)
    down = make("nvfp4", experts=2, n=32, k=16)
    nothing = torch.zeros(0, 1, dtype=torch.long)
    assert fused_moe(gate_up, down, torch.zeros(0, 32), nothing, torch.zeros(0, 1), Activation()).shape == (
        0,
        32,
    )


@pytest.mark.parametrize("exponents", [(91, 100), (100, 200)])
def test_mxfp4_of_any_range(exponents: tuple[int, int]) -> None:
    """Powers of two far beyond what bfloat16 could hold together with the codes."""
    from toolchain.kernels.packing import pack

    generator = torch.Generator().manual_seed(3)
    tensors = {
        "weight": torch.randint(0, 256, (8, 64), dtype=torch.uint8, generator=generator),
        "weight_scale": torch.randint(*exponents, (8, 4), dtype=torch.uint8, generator=generator),
    }
    tensors["weight_scale"][:, 1:] = (
        tensors["weight_scale"][:, :1].clamp(min=90) - torch.tensor([0, 1, 90]).byte()
    )
    packed = pack(KINDS["mxfp4"], [[tensors]], torch.bfloat16)
    values = e2m1.values_of(e2m1.unpack_nibbles(tensors["weight"])).double()
    expected = values * torch.exp2(tensors["weight_scale"].double() - 127).repeat_interleave(32, 1)
    assert torch.equal(unpacked(packed)[0], expected)
    x = inputs(2, 128)
    out = multiply(packed, x, SETTINGS, out_dtype=torch.float64)
    assert_near(out, x.double() @ expected.T, x.double().abs() @ expected.abs().T)


@pytest.mark.parametrize("format", ["fp8", "fp8_per_channel_per_token"])
def test_what_lies_around_torchs_grouped_matmul(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering before it and scattering behind it. torch has it on GPUs alone: here a loop stands in for it, with its
    contract: rows by expert up to ``offs``, row scales left and column scales right."""

    def grouped(
        a: Any, b: Any, scale_a: Any, _: Any, scale_b: Any, __: Any, *, offs: Any, **options: Any
    ) -> Any:
        out = torch.full((a.shape[0], b.shape[-1]), float("nan"))
        begin = 0
        for expert, end in enumerate(offs.tolist()):
            left = a[begin:end].float() * scale_a[begin:end, None]
            out[begin:end] = left @ (b[expert].float() * scale_b[expert])
            begin = end
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", grouped)
    ids = torch.where(everyone(40, 6, 3) == 2, 6, everyone(40, 6, 3))
    gate_up = make(format, experts=6, n=128, k=128, gated=True)
    down = make(format, experts=6, n=128, k=64)
    x = inputs(len(ids), 128, seed=9).float()
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    expected = fused_moe(gate_up, down, x, ids, weights, Activation())
    monkeypatch.setattr("tests.test_kernels.SETTINGS", replace(SETTINGS, by_torch=1))
    actual = fused_moe(gate_up, down, x, ids, weights, Activation())
    assert (actual - expected).abs().max() <= 0.01 * expected.abs().max()
