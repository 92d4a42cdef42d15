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
    return weight.to(dtype)


weights = st.builds(
    random_weight,
    st.integers(0, 10_000),
    st.sampled_from([2, 6, 64]),
    st.sampled_from([128, 256]),
    st.sampled_from(DTYPES),
    st.sampled_from(["gauss", "tails", "zeros", "grid", "outlier", "tiny"]),
)


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
