"""Whole tiny models whose weights stay packed, in Triton's interpreter, against the decoded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.planning import plan_for
from tests.tiny import make_fp8_source, make_mxfp4_source
from toolchain.checkpoint.source import open_source
from toolchain.codecs import get_codec
from toolchain.kernels.kinds import Kind, kind_of
from toolchain.modeling.loading import load_checkpoint
from toolchain.modeling.packed import filling, load_packed, why_not_packed
from toolchain.modeling.packed.experts import FusedExperts
from toolchain.modeling.packed.linear import PackedLinear
from toolchain.modeling.packed.loading import DECODED, packed_bytes, why_not_stored
from toolchain.quantize.job import quantize

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
CASES = [
    ("qwen3_moe", "nvfp4"),
    ("qwen3_moe", "int4_awq"),
    ("qwen3_moe", "fp8"),
    ("qwen3_moe", "fp8_per_channel_per_token"),
    ("qwen3_moe", "fp8_block"),
    ("qwen2_moe", "w4a16_nvfp4"),
    ("mixtral", "int4_gptq"),
    ("glm4_moe", "w4a16_nvfp4"),
    ("deepseek_v2", "fp8_block"),
    ("deepseek_v3", "w4a16_nvfp4"),
    ("gpt_oss", "mxfp4"),
    ("gpt_oss", "nvfp4"),
    ("llama4_text", "fp8"),
    ("minimax", "nvfp4"),
    ("qwen3", "nvfp4"),
]


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def export(kind: str, format: str) -> Path:
        if (kind, format) not in made:
            directory = tmp_path_factory.mktemp("exported") / "checkpoint"
            quantize(plan_for(tiny(kind), format, kv_cache="none"), directory, device="cpu")
            made[kind, format] = directory
        return made[kind, format]

    return export


def logits(model: torch.nn.Module, tokens: int = 9) -> torch.Tensor:
    ids = torch.randint(2, 300, (2, tokens), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        return model(input_ids=ids).logits


def kinds_of(model: torch.nn.Module) -> set[Kind]:
    linears = {module.packed.kind for module in model.modules() if isinstance(module, PackedLinear)}
    return linears | {module.down.kind for module in model.modules() if isinstance(module, FusedExperts)}


@pytest.mark.parametrize(("kind", "format"), CASES)
def test_same_logits_as_the_decoded_model(
    kind: str, format: str, exported: Callable[[str, str], Path]
) -> None:
    directory = exported(kind, format)
    # NVFP4 inputs are left as they are; FP8 ones are rounded, also those of shared experts beside other formats.
    plain = load_checkpoint(directory, device=CPU, dtype=torch.float32, emulate_activations=format != "nvfp4")
    packed = load_packed(directory, device=CPU, dtype=torch.float32)
    rounds = any(kind.rounding != "none" for kind in kinds_of(packed))
    expected, actual = logits(plain), logits(packed)
    # Sums in another order tip a tie of E4M3 now and then, and one step of it is a sixteenth.
    tolerance = 0.03 if rounds else 2e-5
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    kept = {type(module) for module in packed.modules()}
    assert getattr(packed, DECODED) == {}
    assert PackedLinear in kept or FusedExperts in kept
    assert (FusedExperts in kept) == (kind != "qwen3")


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3"])
def test_blackwell_rounds_its_inputs_as_the_emulation(
    kind: str, exported: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVFP4 as a GPU of compute capability 10.0 holds and multiplies it."""
    monkeypatch.setattr(filling, "kind_of", lambda format, capability: kind_of(format, (10, 0)))
    directory = exported(kind, "nvfp4")
    packed = load_packed(directory, device=CPU, dtype=torch.float32)
    assert {item.rounding for item in kinds_of(packed)} == {"nvfp4"}
    expected = logits(load_checkpoint(directory, device=CPU, dtype=torch.float32))
    unrounded = logits(load_checkpoint(directory, device=CPU, dtype=torch.float32, emulate_activations=False))
    actual = logits(packed)
    assert (actual - expected).norm() <= 0.02 * expected.norm() < (unrounded - expected).norm()


def test_no_weight_is_there_twice(exported: Callable[[str, str], Path]) -> None:
    """What lies in memory is what the files hold; units of 32, biases and factors of rows add a little."""
    directory = exported("qwen3_moe", "nvfp4")
    files = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    packed = load_packed(directory, device=CPU, dtype=torch.bfloat16)
    assert packed_bytes(packed) <= 1.1 * files


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3"])
def test_published_checkpoints_stay_as_they_are(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """MXFP4 of gpt-oss and FP8 blocks of DeepSeek-V3, quantized by their publishers."""
    directory = (make_mxfp4_source if kind == "gpt_oss" else make_fp8_source)(
        tiny(kind), tmp_path / "published"
    )
    packed = load_packed(directory, device=CPU, dtype=torch.float32)
    plain = load_checkpoint(directory, device=CPU, dtype=torch.float32)
    if kind == "deepseek_v3":
        # Inputs are rounded in groups, as DeepSeek's own kernels do; the decoded model leaves them alone, and has
        # rounded weight * scale to bfloat16.
        codec, reader = get_codec("fp8_block"), open_source(directory)
        for name in reader.quantized:
            module = plain.get_submodule(name.removesuffix(".weight"))
            module.weight.data = codec.unpack(reader.codes(name), torch.float32)
            module.register_forward_pre_hook(lambda _, args: (codec.quantize_input(args[0], {}),))
    expected, actual = logits(plain), logits(packed)
    tolerance = 2e-5 if kind == "gpt_oss" else 0.01
    assert (actual - expected).norm() <= tolerance * expected.norm()
    assert {kind.format for kind in kinds_of(packed)} == {"mxfp4" if kind == "gpt_oss" else "fp8_block"}


def test_formats_without_kernels_are_decoded_and_named(exported: Callable[[str, str], Path]) -> None:
    directory = exported("qwen3_moe", "mxfp8")
    packed = load_packed(directory, device=CPU, dtype=torch.float32)
    decoded = getattr(packed, DECODED)
    assert decoded and set(decoded.values()) == {"there are no kernels for mxfp8"}
    expected = logits(load_checkpoint(directory, device=CPU, dtype=torch.float32))
    assert torch.allclose(logits(packed), expected, atol=1e-5)


def test_what_cannot_stay_packed_says_why(exported: Callable[[str, str], Path], tiny: Tiny) -> None:
    directory = exported("qwen3_moe", "nvfp4")
    assert "NVIDIA GPU" in str(why_not_packed(directory, CPU))
    assert why_not_stored(directory, None) is None
    assert "float32" in str(why_not_stored(directory, torch.float32))
    assert why_not_stored(tiny("qwen3_moe"), None) == "its weights are not quantized"
