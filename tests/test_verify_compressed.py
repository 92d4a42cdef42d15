"""compressed-tensors checkpoints (llm-compressor): audited as they are, and converted without changing a value."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import compressed
from tests.tiny import make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.audit.runtime import Runtime
from toolchain.checkpoint.convert import convert
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json

Tiny = Callable[[str], Path]
CONVERTIBLE = {
    "NVFP4": "NVFP4",
    "NVFP4A16": "W4A16_NVFP4",
    "FP8": "FP8",
    "FP8_DYNAMIC": "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_BLOCK": "FP8_BLOCK_SCALES",
    "W4A16": "W4A16_AWQ",
}
FAMILIES = ("qwen3_moe", "mixtral", "llama")


def errors(found: Any) -> list[str]:
    return [str(item) for item in found.findings if item.severity == "error"]


def decode(directory: Path) -> dict[str, torch.Tensor]:
    """Module -> weight, from the stored tensors by ModelOpt's definitions of its formats."""
    from safetensors.torch import load_file

    tensors, found = load_file(directory / "model.safetensors"), {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        scale = tensors.get(f"{module}.weight_scale", tensors.get(f"{module}.weight_scale_inv"))
        if scale is None or not name.endswith(".weight"):
            continue
        if scale.dtype == torch.float8_e4m3fn:
            nibbles = torch.stack((weight & 15, weight >> 4), -1).flatten(-2).int()
            values = compressed.E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
            factor = scale.float() * tensors[f"{module}.weight_scale_2"]
            found[module] = values * factor.repeat_interleave(16, 1)
        elif weight.dtype == torch.uint8:
            nibbles = torch.stack((weight & 15, weight >> 4), 1).flatten(0, 1).int()
            found[module] = torch.where(nibbles > 7, nibbles - 16, nibbles) * scale.repeat_interleave(128, 1)
        else:
            wide = scale.unsqueeze(-1) if scale.dim() == 1 else scale
            if wide.dim() == 2 and wide.shape[1] > 0 and scale.dim() == 2:
                wide = wide.repeat_interleave(128, 0).repeat_interleave(128, 1)
                wide = wide[: weight.shape[0], : weight.shape[1]]
            found[module] = weight.float() * wide
    return found


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("scheme", CONVERTIBLE)
def test_a_conversion_decodes_to_the_same_values(tiny: Tiny, tmp_path: Path, kind: str, scheme: str) -> None:
    """Bit for bit in BF16 everywhere; in float32 too, but where 1 / global_scale is rounded."""
    meant = compressed.write(tiny(kind), tmp_path / "theirs", scheme)
    done = convert(tmp_path / "theirs", tmp_path / "ours")
    assert done.quant_algo == CONVERTIBLE[scheme] and done.verdict.passed
    found = decode(tmp_path / "ours")
    assert set(found) == set(meant) and len(meant) == done.exactness.matrices
    for module, values in meant.items():
        assert torch.equal(found[module].bfloat16(), values.bfloat16()), module
        if "NVFP4" not in scheme:
            assert torch.equal(found[module], values), module
    assert done.exactness.same_bf16 == done.exactness.matrices
    assert done.exactness.largest_difference <= (2.0**-22 if "NVFP4" in scheme else 0)
    said = read_json(tmp_path / "ours" / "conversion.json")
    assert said["same_bf16"] == said["matrices"]


@pytest.mark.parametrize("scheme", CONVERTIBLE)
def test_both_layouts_get_the_same_verdict(tiny: Tiny, tmp_path: Path, scheme: str) -> None:
    source = tiny("qwen3_moe")
    compressed.write(source, tmp_path / "theirs", scheme, kv_cache=True)
    theirs = audit(tmp_path / "theirs", against=source)
    assert theirs.passed, errors(theirs)
    assert theirs.facts["layout"] == "compressed-tensors" and theirs.facts["kv_cache_quant_algo"] == "FP8"
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = audit(tmp_path / "ours", against=source)
    assert [str(item) for item in ours.findings] == [str(item) for item in theirs.findings]
    (name,) = theirs.errors["by_format"]
    assert ours.errors["by_format"][name] == pytest.approx(theirs.errors["by_format"][name])


def test_a_converted_checkpoint_runs(tiny: Tiny, tmp_path: Path) -> None:
    """Against transformers on the decoded weights."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from toolchain.modeling.loading import load_checkpoint

    meant = compressed.write(tiny("qwen3_moe"), tmp_path / "theirs", "NVFP4A16")
    convert(tmp_path / "theirs", tmp_path / "ours")
    plain = load_file(tiny("qwen3_moe") / "model.safetensors")
    plain |= {f"{name}.weight": value.bfloat16() for name, value in meant.items()}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    config = (tiny("qwen3_moe") / "config.json").read_text()
    (tmp_path / "plain" / "config.json").write_text(config)
    tokens = torch.arange(4, 36).view(1, -1)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(tokens).logits
        logits = load_checkpoint(tmp_path / "ours", device=torch.device("cpu"))(tokens).logits
    assert torch.allclose(logits.float(), expected.float(), atol=0.05)


def spoil(name: str, value: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(directory / "model.safetensors")
        new = value(tensors.pop(name))
        tensors |= {} if new is None else {name: new}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return change


EXPERT = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize(
    ("change", "code", "where"),
    [
        (spoil(f"{EXPERT}.up_proj.input_global_scale", lambda t: None), "TC-310", f"{EXPERT}.up_proj.input_scale"),
        (spoil(f"{EXPERT}.up_proj.input_global_scale", lambda t: t * 0), "TC-314", f"{EXPERT}.up_proj.input_scale"),
        (spoil(f"{EXPERT}.up_proj.weight_global_scale", lambda t: t * 2), "TC-325", f"{EXPERT}.up_proj"),
        (spoil(f"{EXPERT}.up_proj.weight_scale", lambda t: t[:, :4].contiguous()), "TC-312", f"{EXPERT}.up_proj"),
        (spoil(f"{EXPERT}.up_proj.weight_packed", lambda t: None), "TC-318", f"{EXPERT}.up_proj.weight"),
    ],
)  # fmt: skip
def test_faults_of_their_layout_are_found_and_nothing_is_converted(
    tiny: Tiny, tmp_path: Path, change: Callable[[Path], None], code: str, where: str
) -> None:
    compressed.write(tiny("qwen3_moe"), tmp_path / "theirs", "NVFP4")
    change(tmp_path / "theirs")
    found = audit(tmp_path / "theirs").findings
    assert any(item.code == code and item.where.startswith(where) for item in found), found
    with pytest.raises(ToolchainError, match="nothing was converted"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_the_ignore_list_is_judged_by_what_is_stored(tiny: Tiny, tmp_path: Path) -> None:
    """A router that is not ignored, a name that ignores nothing; expressions and names of targets are understood."""
    source = tiny("qwen3_moe")

    def without_router(config: Any) -> None:
        config["ignore"] = ["lm_head", "re:.*layers.0.mlp.gate$", "model.visual"]

    compressed.write(source, tmp_path / "a", "FP8_BLOCK", change=without_router)
    found = {(item.code, item.where) for item in audit(tmp_path / "a").findings}
    assert ("TC-316", "model.layers.1.mlp.gate") in found and (
        "TC-316",
        "model.layers.0.mlp.gate",
    ) not in found
    assert any(code == "TC-317" and "model.visual" in where for code, where in found)

    def by_name(config: Any) -> None:
        config["ignore"] = []
        config["config_groups"]["group_0"]["targets"] = [
            r"re:.*self_attn\.[qkvo]_proj$",
            r"re:.*experts\.\d+\.\w+$",
        ]

    compressed.write(source, tmp_path / "b", "FP8_BLOCK", change=by_name)
    assert audit(tmp_path / "b").passed
    convert(tmp_path / "b", tmp_path / "c")
    excluded = read_json(tmp_path / "c" / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= set(excluded)


@pytest.mark.parametrize(
    ("scheme", "change", "said"),
    [
        ("W8A8", lambda config: None, "int8 per channel"),
        ("W4A16", lambda config: config["config_groups"]["group_0"]["weights"].update(symmetric=False), "zero points"),
        ("W4A16", lambda config: config["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder"),
        ("FP8", lambda config: config["config_groups"]["group_0"]["input_activations"].update(dynamic=True), "dynamic"),
        ("FP8", lambda config: config.update(config_groups={}), "config_groups"),
    ],
)  # fmt: skip
def test_schemes_without_a_counterpart_are_refused_by_name(
    toolchain: Callable[..., Any],
    tiny: Tiny,
    tmp_path: Path,
    scheme: str,
    change: Callable[[Any], None],
    said: str,
) -> None:
    compressed.write(tiny("qwen3_moe"), tmp_path / "theirs", scheme, change=change)
    ran = toolchain("convert", tmp_path / "theirs", "--output", tmp_path / "ours", "--json")
    error = ran.json["error"]
    assert ran.status == 1 and error["code"] == "TC-341"
    assert said in error["message"]
    assert not (tmp_path / "ours").exists()


def test_the_command_line_of_convert(toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    compressed.write(tiny("mixtral"), tmp_path / "theirs", "NVFP4")
    output = tmp_path / "ours"
    words = ("convert", tmp_path / "theirs", "--output", output)
    ran = toolchain(*words, "--dry-run", "--json")
    assert ran.status == 0 and ran.json["exactness"]["matrices"] == 32 and not output.exists()
    assert toolchain(*words, "--exact").status == 0
    weights = json.loads((output / "config.json").read_text())["quantization_config"]
    assert weights["quant_method"] == "modelopt" and (output / "tokenizer.json").is_file()
    again = toolchain(*words)
    assert again.status == 2 and "TC-004" in again.err
    assert toolchain(*words, "--force").status == 0
    assert toolchain("convert", output, "--output", tmp_path / "x").status == 2
    assert toolchain("verify", output, "--target", "trtllm").status == 0


def test_exact_refuses_what_rounding_would_change(tiny: Tiny, tmp_path: Path) -> None:
    """A divisor whose reciprocal, rounded, puts some product on the other side of a BF16 tie."""
    compressed.write(tiny("llama"), tmp_path / "theirs", "NVFP4A16")
    generator = torch.Generator().manual_seed(0)
    scales, codes = (
        torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
        compressed.E2M1[1:],
    )
    while True:
        divisor = torch.rand(1, generator=generator) * 1000 + 1000
        theirs = codes * (scales / divisor).unsqueeze(1)
        ours = codes * (scales * divisor.reciprocal()).unsqueeze(1)
        if not torch.equal(theirs.bfloat16(), ours.bfloat16()):
            break
    row = int((theirs.bfloat16() != ours.bfloat16()).any(1).nonzero()[0])
    name = "model.layers.0.self_attn.o_proj"

    def all_one_scale(tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor.view(torch.uint8), row + 1).view(torch.float8_e4m3fn)

    spoil(f"{name}.weight_global_scale", lambda t: divisor)(tmp_path / "theirs")
    spoil(f"{name}.weight_scale", all_one_scale)(tmp_path / "theirs")
    with pytest.raises(ToolchainError, match="1 of 14 matrices") as caught:
        convert(tmp_path / "theirs", tmp_path / "ours", exact=True)
    assert caught.value.code == "TC-342" and not (tmp_path / "ours").exists()
    assert convert(tmp_path / "theirs", tmp_path / "ours").exactness.same_bf16 == 13


def test_fused_experts_and_other_layouts_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not stored by compressed-tensors"):
        convert(tiny("llama"), tmp_path / "ours")


@pytest.mark.parametrize(
    ("version", "state"), [("1.2.1", "error"), ("1.3.0rc20", "warning"), ("1.4.0rc1", None)]
)
def test_which_release_reads_it_as_it_is(tiny: Tiny, tmp_path: Path, version: str, state: str | None) -> None:
    compressed.write(tiny("qwen3_moe"), tmp_path / "theirs", "NVFP4")
    found = audit(tmp_path / "theirs", target=Runtime(version=version)).findings
    assert [(item.code, item.severity) for item in found] == ([("TC-339", state)] if state else [])


REAL = Path(__file__).parent.parent / "build" / "accuracy" / "llmcompressor-venv" / "bin" / "python"
SCRIPT = """
import sys
sys.path.insert(0, "benchmarks/accuracy")
import torch
import llmcompressor_plain as plain
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoTokenizer

source, output, scheme = sys.argv[1:]
plain.forget_image_aliases()
torch.Tensor.pin_memory = lambda tensor, *arguments: tensor
model = plain.load(source)
tokens = torch.randint(4, 260, (8, 64), generator=torch.Generator().manual_seed(0))
recipe = QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=plain.KEPT)
oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(source), recipe=recipe, dataset=plain.loader(tokens),
        num_calibration_samples=8, max_seq_length=64)
model.save_pretrained(output, save_compressed=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="llm-compressor's environment is made by benchmarks/accuracy")
@pytest.mark.parametrize("scheme", CONVERTIBLE)
def test_what_llmcompressor_itself_writes(tmp_path: Path, scheme: str) -> None:
    """The generator's layout is the real one: same names, dtypes and shapes, same config; and it converts."""
    from toolchain.checkpoint.reader import CheckpointReader

    source = make_tiny("mixtral", tmp_path / "source")
    words = [str(REAL), "-c", SCRIPT, str(source), str(tmp_path / "real"), scheme]
    subprocess.run(words, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
    compressed.write(source, tmp_path / "generated", scheme)
    real, generated = (CheckpointReader(tmp_path / name).stored for name in ("real", "generated"))
    assert {name: (info.dtype, info.shape) for name, info in real.items()} == {
        name: (info.dtype, info.shape) for name, info in generated.items()
    }
    configs = [
        read_json(tmp_path / name / "config.json")["quantization_config"] for name in ("real", "generated")
    ]
    groups = [config["config_groups"]["group_0"] for config in configs]
    for part in ("weights", "input_activations"):
        for key, value in (groups[1][part] or {}).items():
            assert groups[0][part][key] == value, key
    assert set(configs[0]["ignore"]) == set(configs[1]["ignore"])
    assert convert(tmp_path / "real", tmp_path / "ours").verdict.passed
    assert audit(tmp_path / "real", against=source).passed
