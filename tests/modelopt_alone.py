"""Run as a script: quantize tiny models with ModelOpt alone (fused experts) and export them with its exporter.

    python -m tests.modelopt_alone OUTPUT [--text FILE] [--preset NAME]... SOURCE...

A process of its own: ModelOpt registers module classes globally, and a model with fused experts cannot follow one whose
experts were unfused. Writes OUTPUT/<kind>-<preset>/ and beside it the tokens and the fake-quantized logits.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

PRESETS = ("NVFP4_EXPERTS_ONLY_CFG", "FP8_DEFAULT_CFG")


def calibration_tokens(source: Path, text: Path | None) -> Any:
    """[4, 64] random tokens, or the first 8 x 128 tokens of ``text``."""
    import torch
    from transformers import AutoTokenizer

    if text is None:
        return torch.randint(4, 260, (4, 64), generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(source)
    return torch.tensor(tokenizer(text.read_text()).input_ids[: 8 * 128]).view(8, 128)


def export(source: Path, preset: str, output: Path, text: Path | None) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from toolchain.quantize import backend

    model = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager").eval()
    config = getattr(mtq, preset)
    config = copy.deepcopy(config if isinstance(config, dict) else config.model_dump(exclude_unset=True))
    backend.register()
    for entry in config["quant_cfg"]:
        if isinstance(entry.get("cfg"), dict):
            entry["cfg"] = backend.adapt(entry["cfg"])
    tokens = calibration_tokens(source, text)
    mtq.quantize(model, config, lambda quantized: quantized(tokens))
    with torch.no_grad():
        logits = model(tokens).logits
    export_hf_checkpoint(model, export_dir=output)
    save_file({"tokens": tokens, "logits": logits}, output.with_suffix(".expected"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--preset", action="append")
    given = parser.parse_args()
    for argument in given.sources:
        for name in given.preset or PRESETS:
            export(argument, name, given.output / f"{argument.parent.name}-{name}", given.text)
