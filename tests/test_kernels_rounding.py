"""Rounding of inputs in Triton's interpreter: bit for bit the codecs'."""

from __future__ import annotations

import pytest
import torch

from toolchain.codecs import e2m1, fp8
from toolchain.kernels.kinds import KINDS
from toolchain.kernels.launch import round_inputs, round_nvfp4


def awkward(rows: int, k: int) -> torch.Tensor:
    """Ties, subnormals, zeros, rows of zeros, outliers."""
    generator = torch.Generator().manual_seed(rows * k)
    x = torch.randn(rows, k, generator=generator) * torch.exp2(
        torch.randint(-12, 6, (rows, k), generator=generator)
    )
    x[0, :] = 0
    x[1, ::3] = 448.0
    x[2, :] = torch.arange(k) * 0.0625 - 3
    x[3, : k // 2] = 2.0**-9
    return x


def values(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("k", [128, 200, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_e4m3_under_one_scale(k: int, dtype: torch.dtype) -> None:
    x = awkward(9, k).to(dtype)
    scale = torch.tensor([0.0173])
    made = round_inputs(x, KINDS["fp8"], scale)
    assert torch.equal(values(made.values), values(fp8.encode(x, scale * 448.0).view(torch.uint8)))
    assert torch.equal(made.scale, scale.expand(9))


@pytest.mark.parametrize("k", [128, 200, 96])
def test_e4m3_under_the_scales_of_experts(k: int) -> None:
    x = awkward(5, k)
    scales = torch.tensor([0.01, 0.5, 2.0])
    ids = torch.tensor([0, 1, 2, 2, 1, 0, 0, 7, 1, 2], dtype=torch.int32)  # 7: of no expert
    made = round_inputs(x, KINDS["fp8"], scales, ids, 2)
    for pair, expert in enumerate(ids.tolist()):
        if expert < 3:
            expected = fp8.encode(x[pair // 2], scales[expert] * 448.0)
            assert torch.equal(made.values[pair].view(torch.float8_e4m3fn).float(), expected.float())


@pytest.mark.parametrize("k", [128, 200, 384])
def test_e4m3_per_token_and_per_group(k: int) -> None:
    x = awkward(8, k)
    token = round_inputs(x, KINDS["fp8_per_channel_per_token"])
    expected = fp8.fake_quantize_tokens(x)
    assert torch.equal(values(token.values) * token.scale[:, None], expected)
    group = round_inputs(x, KINDS["fp8_block"])
    spread = group.scale.repeat_interleave(128, 1)[:, :k]
    assert torch.equal(values(group.values) * spread, fp8.fake_quantize_groups(x, 128))


@pytest.mark.parametrize("k", [64, 128, 144, 2048])
def test_nvfp4(k: int) -> None:
    x = awkward(6, k)
    scale_2 = e2m1.global_scale(x.abs().amax())
    codes, scales = round_nvfp4(x, scale_2.reshape(1))
    expected = e2m1.block_scales(x, scale_2)
    assert torch.equal(values(scales), expected.float())
    made = e2m1.decode(e2m1.unpack_nibbles(codes), expected, scale_2, torch.float32)
    assert torch.equal(made, e2m1.fake_quantize(x, scale_2))
