"""llm-compressor by its own examples, in its own environment: a script that imports nothing of this project.

    PYTHON benchmarks/accuracy/llmcompressor_plain.py REQUEST.json

``load_context`` linearises fused experts while loading, ``oneshot`` calibrates (all experts see all tokens, its
default), ``save_pretrained(save_compressed=True)`` writes compressed-tensors. What is judged is that checkpoint, loaded
again and run by compressed-tensors' own fake quantization of weights and activations; its logits on the evaluation
windows are written as float32, and the KL is computed by the caller. The bf16 values that it decompresses to are
computed in float32, like the reference.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

KEPT = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$", "re:.*shared_expert_gate$"]
"""What its MoE examples ignore."""
TARGETS = {"all-linear": ["Linear"], "experts-only": [r"re:.*\.experts\.\d+\.\w+$"]}
BATCH = 4


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result: dict[str, Any] = {}
    torch.set_grad_enabled(False)
    forget_image_aliases()
    if request["settings"]:
        result = compress(request)
        source = request["checkpoint"]
    else:
        source = request["model"]
    model = load(source)
    tokens = load_file(request["evaluation"])["tokens"]
    logits = [model(input_ids=part, use_cache=False).logits.float() for part in tokens.split(BATCH)]
    save_file({"logits": torch.cat(logits).contiguous()}, request["logits"])
    result["versions"] = versions()
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


def forget_image_aliases() -> None:
    """Loading linearised experts lists every loaded transformers module, and that imports the image processors that
    these aliases stand for, which fails without torchvision (there is none for a CPU build on the package index)."""
    import llmcompressor.utils  # noqa: F401 creates them, again

    for name in [
        name for name in sys.modules if name.startswith("transformers.models.") and name.endswith("_fast")
    ]:
        del sys.modules[name]


def compress(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize ``model`` into ``checkpoint``."""
    from llmcompressor import oneshot
    from llmcompressor.utils import load_context
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with load_context():
        model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    tokens = load_file(request["calibration"])["tokens"]
    started = time.monotonic()
    data: dict[str, Any] = {}
    if request["calibrated"]:
        data = {
            "dataset": loader(tokens),
            "num_calibration_samples": len(tokens),
            "max_seq_length": tokens.shape[1],
        }
    with torch.enable_grad():
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(request["model"]),
            recipe=recipe(request),
            **data,
        )
    seconds = round(time.monotonic() - started, 1)
    model.save_pretrained(request["checkpoint"], save_compressed=True)
    return {"seconds": seconds}


def recipe(request: dict[str, Any]) -> Any:
    """One modifier with a preset scheme; AWQ goes before the rounding modifier, as in its examples."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    settings = request["settings"]
    common = {"targets": TARGETS[request["policy"]], "scheme": settings["scheme"], "ignore": KEPT}
    if settings.get("modifier") == "gptq":
        return GPTQModifier(**common)
    if settings.get("modifier") == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(), QuantizationModifier(**common)]
    return QuantizationModifier(**common)


def loader(tokens: torch.Tensor) -> Any:
    """The calibration tokens [samples, length] as they are: no padding, no template, no other order."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    return torch.utils.data.DataLoader(rows, batch_size=BATCH)


def load(directory: str) -> Any:
    """A plain or compressed checkpoint in float32: weights decoded from their bytes, activations quantized on the way.

    compressed-tensors decodes at the first forward, into bfloat16; a second rounding that no kernel does. Floating
    scales and float32 codes keep it out, in the peer's favour.
    """
    from compressed_tensors.compressors.nvfp4 import base
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from llmcompressor.utils import load_context
    from transformers import AutoModelForCausalLM

    base.unpack_fp4_from_uint8 = partial(unpack_fp4_from_uint8, dtype=torch.float32)
    with load_context():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    torch.nn.Module.float(model)
    model.eval()
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    left = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if left:
        raise SystemExit(f"{directory} was not decoded into float32: {left}")
    return model


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}


if __name__ == "__main__":
    main()
