"""Codecs against ModelOpt's own packing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.codecs import Calibrated, e2m1, get_codec
from toolchain.formats import FORMATS

DTYPES = (torch.float32, torch.bfloat16)


def random_weight(seed: int, rows: int, columns: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Weights as they occur (Gaussian, heavy tails) and as they should not (zero blocks, ties, one huge outlier)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "tails":
        weight = weight.pow(3)
    elif kind == "zeros":
        weight[:, : columns // 2] = 0.0
        weight[0, 0] = -0.0
    elif kind == "grid":
        weight = (weight * 4).round() / 4
    elif kind == "outlier":
        weight[0, 0] = 1e4
    elif kind == "tiny":
        weight = weight * 1e-6
    elif kind == "subnormal":
        weight = weight * 1e-39
    return weight.to(dtype)


weights = st.builds(
    random_weight,
    st.integers(0, 10_000),
    st.sampled_from([2, 6, 64]),
    st.sampled_from([128, 256]),
    st.sampled_from(DTYPES),
    st.sampled_from(["gauss", "tails", "zeros", "grid", "outlier", "tiny"]),
)
"""In whole groups, for formats that need them."""

odd_weights = st.builds(
    random_weight,
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 127, 130]),
    st.sampled_from([32, 128, 160, 257]),
    st.sampled_from(DTYPES),
    st.sampled_from(["gauss", "tails", "zeros", "grid", "outlier", "tiny", "subnormal"]),
)
"""Of any size, and down to numbers that have no normal float32."""


def calibrated(weight: torch.Tensor) -> Calibrated:
    return Calibrated(weight_amax=weight.abs().amax().float(), input_amax=torch.tensor(3.0))


def test_every_format_has_a_codec_with_its_tensors() -> None:
    weight = random_weight(0, 64, 256, torch.bfloat16, "gauss")
    for item in FORMATS:
        packed = get_codec(item.name).pack(weight, calibrated(weight))
        required = {stored.suffix: stored for stored in item.stored if stored.required}
        assert set(packed) == set(required)
        for suffix, tensor in packed.items():
            assert tuple(tensor.shape) == required[suffix].shape(64, 256)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_nvfp4_is_bit_exact_with_modelopt(weight: torch.Tensor) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    scale_2 = NVFP4QTensor.get_weights_scaling_factor_2(weight)
    theirs, scales, _ = NVFP4QTensor.quantize(weight.clone(), 16, None, scale_2)
    ours = get_codec("nvfp4").pack(weight, calibrated(weight))
    assert torch.equal(ours["weight_scale_2"], scale_2)
    assert torch.equal(ours["weight_scale"].view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(ours["weight"], theirs._quantized_data)
    decoded = theirs.dequantize(dtype=weight.dtype, scale=scales, double_scale=scale_2, block_sizes={-1: 16})
    assert torch.equal(get_codec("nvfp4").unpack(ours, weight.dtype), decoded)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_nvfp4_activations_hold_what_packing_would_store(weight: torch.Tensor) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    scale_2 = NVFP4QTensor.get_weights_scaling_factor_2(weight) * 0.5  # a calibrated scale that is exceeded
    theirs, scales, _ = NVFP4QTensor.quantize(weight.clone(), 16, None, scale_2)
    decoded = theirs.dequantize(dtype=weight.dtype, scale=scales, double_scale=scale_2, block_sizes={-1: 16})
    assert torch.equal(e2m1.fake_quantize(weight, scale_2).abs(), decoded.abs())
    assert torch.equal(e2m1.fake_quantize(weight, scale_2), decoded)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_int4_is_bit_exact_with_modelopt(weight: torch.Tensor) -> None:
    from modelopt.torch.export.quant_utils import (
        QUANTIZATION_INT4_AWQ,
        get_scaling_factor_from_weight,
        to_quantized_weight,
    )

    scales = get_scaling_factor_from_weight(weight, 128)
    theirs = to_quantized_weight(weight, scales, QUANTIZATION_INT4_AWQ, block_size=128)
    ours = get_codec("int4_awq").pack(weight, Calibrated())
    assert torch.equal(ours["weight_scale"], scales)
    assert torch.equal(ours["weight"], theirs)
    decoded = get_codec("int4_awq").unpack(ours, torch.float32)
    per_element = scales.repeat_interleave(128, dim=1)
    assert torch.equal(decoded, (weight / per_element).round().clamp(-8, 7) * per_element)


@settings(max_examples=60, deadline=None)
@given(odd_weights)
def test_fp8_blocks_are_bit_exact_with_modelopt(weight: torch.Tensor) -> None:
    from modelopt.torch.quantization.qtensor import FP8QTensor

    ours = get_codec("fp8_block").pack(weight, Calibrated())
    scales = ours["weight_scale_inv"]
    assert tuple(scales.shape) == tuple(-(-size // 128) for size in weight.shape)
    padded = torch.zeros([128 * size for size in scales.shape])
    padded[: weight.shape[0], : weight.shape[1]] = weight.float().abs()
    amax = padded.view(scales.shape[0], 128, scales.shape[1], 128).amax((1, 3))
    assert torch.equal(scales, torch.where(amax > 0, amax / 448, torch.ones_like(amax)))
    theirs, _ = FP8QTensor.quantize(weight, scales.clone(), block_sizes={-1: 128, -2: 128})
    assert torch.equal(ours["weight"].float(), theirs._quantized_data.float())
    decoded = get_codec("fp8_block").unpack(ours, torch.float32)
    blocks = {-1: 128, -2: 128}
    if all(size % 128 == 0 for size in weight.shape):
        assert torch.equal(decoded, theirs.dequantize(torch.float32, scale=scales, block_sizes=blocks))
    as_modelopt = {"weight": ours["weight"], "weight_scale": scales[:, None, :, None]}
    assert torch.equal(decoded, get_codec("fp8_block").unpack(as_modelopt, torch.float32))


@settings(max_examples=60, deadline=None)
@given(odd_weights)
def test_formats_with_a_scale_per_channel_are_bit_exact_with_modelopt(weight: torch.Tensor) -> None:
    from modelopt.torch.export import quant_utils

    amax = weight.abs().amax(-1).float()
    cases = {
        "fp8_per_channel_per_token": (448.0, quant_utils.QUANTIZATION_FP8_PC_PT),
        "int8_wo": (127.0, quant_utils.QUANTIZATION_INT8_WO),
        "int8_sq": (127.0, quant_utils.QUANTIZATION_INT8_SQ),
    }
    for name, (largest, quantization) in cases.items():
        ours = get_codec(name).pack(weight, calibrated(weight))
        scales = torch.where(amax > 0, amax / largest, torch.ones_like(amax))
        assert torch.equal(ours["weight_scale"], scales)
        theirs = quant_utils.to_quantized_weight(weight, scales, quantization)
        assert theirs.dtype == ours["weight"].dtype
        assert torch.equal(ours["weight"].float(), theirs.float())
        decoded = get_codec(name).unpack(ours, torch.float32)
        assert torch.equal(decoded, theirs.float() * scales[:, None])


@settings(max_examples=60, deadline=None)
@given(odd_weights.filter(lambda weight: weight.shape[1] % 32 == 0))
def test_mx_formats_are_bit_exact_with_modelopt(weight: torch.Tensor) -> None:
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor

    ours = get_codec("mxfp4").pack(weight, Calibrated())
    fp4, scales = MXFP4QTensor.quantize(weight, 32)
    assert torch.equal(ours["weight"], fp4._quantized_data)
    assert torch.equal(ours["weight_scale"], scales.view(weight.shape[0], -1))
    decoded = fp4.dequantize(torch.float32, scale=scales, block_sizes={-1: 32})
    assert torch.equal(get_codec("mxfp4").unpack(ours, torch.float32), decoded)

    ours = get_codec("mxfp8").pack(weight, Calibrated())
    fp8, scales = MXFP8QTensor.quantize(weight)
    assert torch.equal(ours["weight"].float(), fp8._quantized_data.float())
    assert torch.equal(ours["weight_scale"], scales)
    decoded = fp8.dequantize(torch.float32, scale=scales)
    assert torch.equal(get_codec("mxfp8").unpack(ours, torch.float32), decoded)
    assert torch.equal(get_codec("mxfp8").quantize_input(weight, {}), decoded.to(weight.dtype))


@settings(max_examples=60, deadline=None)
@given(weights)
def test_nvfp4_weights_of_other_activations_are_bit_exact_with_modelopt(weight: torch.Tensor) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    for name, block, largest in (("w4a16_nvfp4", 16, 6.0 * 448.0), ("w4a8_nvfp4_fp8", 32, 448.0)):
        scale_2 = weight.abs().amax().float() / largest
        theirs, scales, _ = NVFP4QTensor.quantize(weight.clone(), block, None, scale_2)
        ours = get_codec(name).pack(weight, calibrated(weight))
        assert torch.equal(ours["weight_scale_2"], scale_2)
        assert torch.equal(ours["weight_scale"].view(torch.uint8), scales.view(torch.uint8))
        assert torch.equal(ours["weight"], theirs._quantized_data)
        decoded = theirs.dequantize(
            dtype=weight.dtype, scale=scales, double_scale=scale_2, block_sizes={-1: block}
        )
        assert torch.equal(get_codec(name).unpack(ours, weight.dtype), decoded)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_w4a8_awq_stores_int4_and_computes_on_fp8(weight: torch.Tensor) -> None:
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    int4, ours = get_codec("int4_awq"), get_codec("w4a8_awq")
    packed = ours.pack(weight, calibrated(weight))
    same = int4.pack(weight, Calibrated())
    assert torch.equal(packed["weight"], same["weight"])
    assert torch.equal(packed["weight_scale"], same["weight_scale"])
    assert torch.equal(packed["weight_scale_2"], weight.abs().amax().float() / 448)
    exact = int4.unpack(same, torch.float32)
    rounded, found = fp8_eager(exact, weight.abs().amax().float()), ours.unpack(packed, torch.float32)
    # ModelOpt multiplies by a reciprocal where we divide: what lies in the middle of two FP8 numbers may go either way.
    apart = ~torch.isclose(found, rounded, rtol=4e-7, atol=0)
    torch.testing.assert_close(((found + rounded) / 2)[apart], exact[apart], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_fp8_activations_are_scaled_by_their_own_maximum(dtype: torch.dtype) -> None:
    """One scale per token, or per 128 elements of a token. ModelOpt multiplies by the reciprocal of a reciprocal, so
    the last place of the product may differ."""
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    x = random_weight(1, 24, 300, dtype, "tails")
    x[3] = 0
    rtol = 4e-7 if dtype is torch.float32 else 2**-7
    whole = fp8_eager(x, x.abs().amax(-1, keepdim=True))
    ours = get_codec("fp8_per_channel_per_token").quantize_input(x, {})
    torch.testing.assert_close(ours, whole, rtol=rtol, atol=0)
    pieces = torch.cat([fp8_eager(p, p.abs().amax(-1, keepdim=True)) for p in x.split(128, dim=-1)], -1)
    ours = get_codec("fp8_block").quantize_input(x, {})
    torch.testing.assert_close(ours, pieces, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_are_those_of_modelopt(dtype: torch.dtype) -> None:
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

    x = random_weight(1, 64, 128, dtype, "tails")
    for value in (2.5, 0.731, 17.0):
        amax = torch.tensor(value)
        ours = get_codec("int8_sq").quantize_input(x, {"input_scale": amax / 127.0})
        theirs = fake_tensor_quant(x, amax, None, 8, False, False)  # -128..127, as its quantizers do
        # On a tie the reciprocal decides: one step, on hardly any element.
        step = (ours - theirs).abs().float()
        assert float((step > 1e-6).float().mean()) < 0.002 and float(step.max()) <= value / 127.0 * 1.01


@settings(max_examples=60, deadline=None)
@given(weights)
def test_fp8_stores_what_modelopt_fake_quantization_evaluates(weight: torch.Tensor) -> None:
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    found = calibrated(weight)
    ours = get_codec("fp8").pack(weight, found)
    decoded = get_codec("fp8").unpack(ours, torch.float32)
    theirs = fp8_eager(weight.float(), found.weight_amax)
    torch.testing.assert_close(decoded, theirs, rtol=3e-7, atol=0)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_fp8_is_within_one_code_of_modelopts_packing(weight: torch.Tensor) -> None:
    """Its exporter divides in the weight's dtype: ties fall differently, and bf16 weights are rounded twice."""
    from modelopt.torch.export.quant_utils import QUANTIZATION_FP8, to_quantized_weight

    ours = get_codec("fp8").pack(weight, calibrated(weight))
    theirs = to_quantized_weight(weight, ours["weight_scale"], QUANTIZATION_FP8)
    left, right = (tensor.view(torch.uint8).int() for tensor in (ours["weight"], theirs))
    same_sign = (left & 0x80) == (right & 0x80)
    assert ((left - right).abs()[same_sign] <= 1).all()
    assert ((left & 0x7F)[~same_sign] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_activations_are_those_of_modelopt(dtype: torch.dtype) -> None:
    """Out-of-range values saturate. A step of the last place is possible where scale * 448 misses the amax by one."""
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    x = random_weight(1, 64, 128, dtype, "tails")
    for value in (2.5, 0.731, 17.0):
        amax = torch.tensor(value)
        ours = get_codec("fp8").quantize_input(x, {"input_scale": amax / 448.0})
        torch.testing.assert_close(
            ours, fp8_eager(x, amax), rtol=4e-7 if dtype is torch.float32 else 0, atol=0
        )
