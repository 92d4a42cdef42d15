"""gpt-oss and Llama 4: experts stored fused and input-first, unfused in memory, exported as ModelOpt and the hub do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from toolchain.checkpoint.audit import audit
from toolchain.core.progress import Silent
from toolchain.modeling.loading import load_checkpoint, load_source
from toolchain.quantize.job import calibrate

CPU = torch.device("cpu")
FUSED = ("gpt_oss", "llama4_text")
Tiny = Callable[[str], Path]


def sample() -> torch.Tensor:
    return torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))


def transformers_model(source: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation="eager").eval()


def output_directory(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("kind", FUSED)
@torch.no_grad()
def test_unfused_experts_compute_what_transformers_computes(tiny: Tiny, kind: str) -> None:
    """float32, 1e-5: one matmul per expert and projection adds the same products in another order."""
    ours = load_source(tiny(kind), device=CPU, dtype=torch.float32)
    theirs = transformers_model(tiny(kind))
    torch.testing.assert_close(ours(sample()).logits, theirs(sample()).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gpt_oss_clamps_and_biases_are_kept(tmp_path: Path) -> None:
    """Weights so large that gate and up pass the limit of 7, and biases that are not zero."""
    from safetensors.torch import load_file, save_file

    from tests.tiny import make_tiny

    source = make_tiny("gpt_oss", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in tensors:
        if name.endswith("gate_up_proj"):
            tensors[name] *= 20
        if name.endswith("_bias"):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator).to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ours: Any = load_source(source, device=CPU, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    ours.get_submodule("model.layers.0.mlp.experts.0.gate_proj").register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    logits = ours(sample()).logits
    assert seen[0].max() > 7
    torch.testing.assert_close(logits, transformers_model(source)(sample()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format_name", ["nvfp4", "fp8", "w4a16_nvfp4"])
@pytest.mark.parametrize("kind", FUSED)
def test_every_format_passes_its_audit_and_runs(
    tiny: Tiny, tmp_path: Path, kind: str, format_name: str
) -> None:
    source, output = tiny(kind), tmp_path / "out"
    done = calibrate(plan_for(source, format_name, policy="all-linear"), device="cpu")
    done.exporter.write(output_directory(output), Silent())
    model = load_checkpoint(output, device=CPU)
    with torch.no_grad():
        assert torch.equal(model(sample()).logits, done.model(sample()).logits)
    verdict = audit(output, against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
