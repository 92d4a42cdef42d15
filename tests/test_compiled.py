"""The compiled loops give what torch's operations and ModelOpt's packing give, bit for bit."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from tests.planning import plan_for
from tests.tiny import make_fp8_source
from toolchain.codecs import Calibrated, compiled, e2m1, get_codec, mx
from toolchain.plan.policy import PolicyOptions
from toolchain.quantize.accuracy.grids import Nvfp4Grid
from toolchain.quantize.accuracy.scale_search import _best, choose_scales
from toolchain.quantize.job import quantize

pytest.importorskip("numba")

FINITE_E4M3 = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FINITE_BF16 = BF16[BF16.isfinite()]


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST_ELEMENTS", 1)
    assert compiled.load() is not None


def by_torch(
    weight: torch.Tensor, scale_2: torch.Tensor, scales: torch.Tensor | None, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scales = e2m1.block_scales(weight, scale_2, block) if scales is None else scales
    return e2m1.pack_nibbles(e2m1.encode(weight, scales, scale_2)), scales


def assert_same(
    weight: torch.Tensor, scale_2: torch.Tensor, scales: torch.Tensor | None = None, block: int = 16
) -> None:
    found = compiled.pack_nvfp4(weight, scale_2, scales, block)
    assert found is not None
    for got, expected in zip(found, by_torch(weight, scale_2, scales, block), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 16), (7, 48), (3, 5, 64), (0, 32)]),
    exponent=st.integers(-60, 60),
    block=st.sampled_from([16, 8]),
)
def test_fake_quantized_values_are_those_of_torch(
    seed: int, shape: tuple[int, ...], exponent: int, block: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0**exponent
    x *= torch.randint(-12, 4, shape, generator=generator).float().exp2()
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    x[torch.rand(shape, generator=generator) < 0.1] *= -0.0
    scale_2 = e2m1.global_scale(torch.tensor(2.0**exponent * 3))
    found = compiled.fake_nvfp4(x, scale_2, block)
    assert found is not None and torch.equal(
        found.view(torch.int32), e2m1.fake_quantize(x, scale_2, block).view(torch.int32)
    )


@pytest.mark.parametrize("block", [16, 32])
def test_learned_scales_round_as_torch_rounds(block: int) -> None:
    generator = torch.Generator().manual_seed(block)
    blocks = torch.randn(4096, block, generator=generator)
    scale_2 = e2m1.global_scale(torch.tensor(3.0))
    # From below the smallest scale of E4M3 to above its largest, and amax that training made negative.
    pre, post = (3.0 * torch.exp2(torch.empty(4096).uniform_(-20, 1, generator=generator)) for _ in range(2))
    post[::7] *= -1
    under, over = (
        (amax / (6 * scale_2)).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * scale_2
        for amax in (pre, post)
    )
    scaled = blocks / under[:, None]
    compiled.load()
    found = compiled.learned_nvfp4(blocks, pre, post, scale_2)
    assert found is not None
    out, values, inside, slopes = found
    assert torch.equal(values, e2m1.round_values(scaled)) and torch.equal(inside, scaled.abs() <= 6)
    assert torch.equal(out, values * over[:, None]) and torch.equal(slopes, over / under)


def test_what_is_not_finite_is_told_as_torch_tells_it() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 20], x[2, 40] = float("inf"), float("-inf"), float("nan")
    scale_2 = e2m1.global_scale(torch.tensor(3.0))
    found = compiled.fake_nvfp4(x, scale_2, 16)
    assert found is not None
    torch.testing.assert_close(found, e2m1.fake_quantize(x, scale_2), rtol=0, atol=0, equal_nan=True)


def test_ties_of_every_code() -> None:
    """Every E2M1 value, every middle between two, and their neighbours in float32."""
    values = torch.tensor(
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 5.5, 6.0]
    )
    near = torch.cat([values, values.nextafter(torch.tensor(7.0)), values.nextafter(torch.tensor(-7.0))])
    x = torch.cat([near, -near, torch.full((32,), 6.0)]).view(-1, 16)
    x[:, 0] = 6.0
    scale_2 = torch.tensor(1.0 / 448) * 448
    found = compiled.fake_nvfp4(x, scale_2, 16)
    assert found is not None and torch.equal(found, e2m1.fake_quantize(x, scale_2))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 40),
    power=st.sampled_from([1, 3, 9]),
    size=st.sampled_from([1e-38, 1e-20, 1e-6, 0.02, 1.0, 1e4, 1e30, 3e38]),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([16, 32]),
    siblings=st.sampled_from([1.0, 1.5, 1e3, 1e6]),
)
def test_random_numbers(
    seed: int,
    rows: int,
    blocks: int,
    power: int,
    size: float,
    dtype: torch.dtype,
    block: int,
    siblings: float,
) -> None:
    """Tails, subnormals, numbers near the end of their dtype, rows of zeros, and an amax that siblings decide."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, blocks * block, generator=generator) ** power * size
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    weight[0, :block] = 0
    weight = weight.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    scale_2 = e2m1.global_scale((weight.float().abs().amax() * siblings).clamp(max=3e38))
    assert_same(weight, scale_2, block=block)
    given_scales = FINITE_E4M3[1:127][torch.randint(0, 126, (rows, blocks), generator=generator)]
    assert_same(weight, scale_2, given_scales.view(torch.float8_e4m3fn), block)


def test_every_tie_and_its_neighbours() -> None:
    """Elements at each midpoint of E2M1, one step of float32 above and below it, under every E4M3 scale."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0])
    near = torch.cat(
        [ties, torch.nextafter(ties, torch.tensor(9.0)), torch.nextafter(ties, torch.tensor(-9.0))]
    )
    row = torch.cat([near, -near])
    codes = FINITE_E4M3[1:127]
    scales = codes.view(torch.float8_e4m3fn).reshape(-1, 1).expand(-1, len(row) // 16)
    for scale_2 in (1.0, 2.0**-7, 3e-4):
        factor = scales[:, :1].float() * scale_2
        assert_same(row * factor, torch.tensor(scale_2), scales.contiguous())
        assert_same(row * factor, torch.tensor(scale_2))


def test_every_bfloat16_number_and_every_block_scale() -> None:
    magnitudes = FINITE_BF16[: len(FINITE_BF16) // 32 * 32]
    for scale_2 in (1e-30, 1e-4, 1.0, 1e30):
        assert_same(magnitudes.reshape(-1, 32), torch.tensor(scale_2))
        # One number and zeros in a block: the scale is that of the number.
        alone = torch.zeros(len(FINITE_BF16), 16, dtype=torch.bfloat16)
        alone[:, 5] = FINITE_BF16
        assert_same(alone, torch.tensor(scale_2))


def test_modelopts_packing() -> None:
    weight = (torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) ** 3).to(torch.bfloat16)
    weight[2] = 0
    expected, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    found = get_codec("w4a16_nvfp4").pack(weight, Calibrated())
    assert torch.equal(found["weight"], expected._quantized_data)
    assert torch.equal(found["weight_scale"].view(torch.uint8), scale.view(torch.uint8).reshape(64, 16))
    assert torch.equal(found["weight_scale_2"], scale_2.reshape(()))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 40),
    power=st.sampled_from([1, 3, 9]),
    size=st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 1e4]),
    method=st.sampled_from(["window", "four_over_six"]),
    block=st.sampled_from([16, 32]),
)
def test_the_search_for_scales(
    seed: int, rows: int, blocks: int, power: int, size: float, method: str, block: int
) -> None:
    """Every block gets the scale that trying the candidates with torch gives it, equal errors included."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, blocks * block, generator=generator) ** power * size
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    weight[0, :block] = 0
    grid = Nvfp4Grid(e2m1.global_scale(weight.abs().amax()), block)
    found = choose_scales(weight, grid, method)
    expected = _best(weight, grid, method, None)
    assert compiled.sum_lanes(block) is not None
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 40),
    power=st.sampled_from([1, 3, 9]),
    size=st.sampled_from([1e-38, 1e-20, 0.02, 1.0, 1e30]),
)
def test_mxfp4(seed: int, rows: int, blocks: int, power: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, blocks * 32, generator=generator) ** power * size
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    weight[0, :32] = 0
    assert_same_mxfp4(weight.clamp(-3e38, 3e38).to(torch.bfloat16))


def test_mxfp4_of_every_bfloat16_number_and_tie() -> None:
    assert_same_mxfp4(FINITE_BF16[: len(FINITE_BF16) // 32 * 32].reshape(-1, 32))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4) * torch.tensor([1.0, -1.0] * 16)
    assert_same_mxfp4((ties * torch.exp2(torch.arange(-120, 120).float()).unsqueeze(1)).to(torch.bfloat16))


def assert_same_mxfp4(weight: torch.Tensor) -> None:
    amax = weight.unflatten(-1, (-1, 32)).abs().amax(-1).float()
    found = compiled.block_amax(weight, 32)
    assert found is not None and torch.equal(found, amax)
    exponent = mx.exponents(weight, e2m1.E2M1_MAX)
    packed = compiled.pack_mxfp4(weight, torch.exp2(exponent))
    assert packed is not None
    assert torch.equal(packed, e2m1.pack_nibbles(mx.encode_fp4(weight, exponent)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitude(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-30, 1.0, 1e4):
        weight = (torch.randn(7, 33, 2, generator=generator) * size).to(dtype)
        assert torch.equal(compiled.largest_magnitude(weight), weight.abs().amax().float())
    weight[3, 3] = float("nan")
    assert compiled.largest_magnitude(weight).isnan()
    assert compiled.largest_magnitude(torch.zeros(3, 3).to(dtype)) == 0


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 16)])
@pytest.mark.parametrize("shape", [(384, 512), (130, 200), (1, 16)])
def test_fp8_blocks(block: tuple[int, int], shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = FINITE_E4M3[torch.randint(0, len(FINITE_E4M3), shape, generator=generator)].view(
        torch.float8_e4m3fn
    )
    rows, columns = block
    for size in (1e-38, 1e-4, 1.0, 1e36):
        scales = torch.rand(-(-shape[0] // rows), -(-shape[1] // columns), generator=generator) * size
        spread = scales.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
        expected = (codes.float() * spread).to(torch.bfloat16)
        found = compiled.dequantize_fp8(codes, scales, block)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(
    ("weight", "scale_2"),
    [
        (torch.ones(2, 24), 1.0),
        (torch.ones(32), 1.0),
        (torch.ones(2, 32, dtype=torch.float64), 1.0),
        (torch.ones(2, 32), float("inf")),
        (torch.ones(2, 32), float("nan")),
        (torch.ones(2, 32, device="meta"), 1.0),
    ],
)
def test_what_is_left_to_torch(weight: torch.Tensor, scale_2: float) -> None:
    assert compiled.pack_nvfp4(weight, torch.tensor(scale_2), None, 16) is None


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    codes, scales = weight.to(torch.float8_e4m3fn), torch.ones(1, 1)
    with_numba = get_codec("w4a16_nvfp4").pack(weight, Calibrated())
    dequantized = compiled.dequantize_fp8(codes, scales, (128, 128))
    real = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == "numba":
            raise ImportError(name)
        return real(name, *rest, **options)

    compiled.load.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    try:
        assert compiled.load() is None
        for name, tensor in get_codec("w4a16_nvfp4").pack(weight, Calibrated()).items():
            assert torch.equal(
                tensor.reshape(-1).view(torch.uint8), with_numba[name].reshape(-1).view(torch.uint8)
            )
        assert torch.equal(compiled.dequantize_fp8(codes, scales, (128, 128)), dequantized)
        assert compiled.largest_magnitude(weight) == weight.abs().amax()
    finally:
        compiled.load.cache_clear()


@pytest.mark.parametrize("recipe", ["pinned", "window+pinned", "four_over_six+pinned"])
@pytest.mark.parametrize("fp8", [False, True])
def test_whole_checkpoints(
    recipe: str, fp8: bool, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed with compiled loops, from BF16 and from FP8 blocks: the files of the model in memory by torch alone."""
    source = tiny("deepseek_v3")
    if fp8:
        source = make_fp8_source(source, tmp_path / "source")
    plan = plan_for(source, "nvfp4", recipe=recipe, policy_options=PolicyOptions(shared_experts="bf16"))
    quantize(plan, tmp_path / "compiled", device="cpu", stream=True)
    monkeypatch.setattr(compiled, "LEAST_ELEMENTS", 1 << 60)
    quantize(plan, tmp_path / "torch", device="cpu", stream=False)
    names = sorted(path.name for path in (tmp_path / "torch").glob("*.safetensors"))
    assert names and all(
        (tmp_path / "compiled" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()
        for name in names
    )
