"""Run as a script: quantize tiny models with ModelOpt alone (fused experts) and export them with its exporter.

    python -m tests.modelopt_alone OUTPUT SOURCE...

A process of its own: ModelOpt registers module classes globally, and a model with fused experts cannot follow one whose
experts were unfused. Writes OUTPUT/<kind>-<preset>/ and beside it the tokens and the fake-quantized logits.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

PRESETS = ("NVFP4_EXPERTS_ONLY_CFG", "FP8_DEFAULT_CFG")


def export(source: Path, preset: str, output: Path) -> None:
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
    backend.use_in(config["quant_cfg"])
    tokens = torch.randint(4, 260, (4, 64), generator=torch.Generator().manual_seed(0))
    mtq.quantize(model, config, lambda quantized: quantized(tokens))
    with torch.no_grad():
        logits = model(tokens).logits
    export_hf_checkpoint(model, export_dir=output)
    save_file({"tokens": tokens, "logits": logits}, output.with_suffix(".expected"))


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        for name in PRESETS:
            export(Path(argument), name, Path(sys.argv[1]) / f"{Path(argument).parent.name}-{name}")
