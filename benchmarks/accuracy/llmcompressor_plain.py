"""llm-compressor by its own examples, in its own environment: a script that imports nothing of this project.

    PYTHON benchmarks/accuracy/llmcompressor_plain.py REQUEST.json

``load_context`` linearises fused experts while loading, ``oneshot`` calibrates (all experts see all tokens, its
default), ``save_pretrained(save_compressed=True)`` packs the model in memory and writes it as compressed-tensors. The
packed tensors, checked to be those of the files, are decoded and run by compressed-tensors; the logits on the
evaluation windows are written as float32, and the KL is computed by the caller.
"""

from __future__ import annotations

import hashlib
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
    if not torch.cuda.is_available():
        # Its AWQ pins cached activations, which fails without an accelerator and changes no number.
        torch.Tensor.pin_memory = lambda tensor, *arguments: tensor
    model = load(request["model"])
    if request["settings"]:
        result["seconds"] = compress(model, request)
        require_same_bytes(model, Path(request["checkpoint"]))
    in_float32(model)
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


def compress(model: Any, request: dict[str, Any]) -> float:
    """Quantize ``model`` in place and write it to ``checkpoint``; returns the seconds of the first."""
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    tokens = load_file(request["calibration"])["tokens"]
    started = time.monotonic()
    data: dict[str, Any] = {}
    if request["calibrated"]:
        data = {
            "dataset": loader(tokens),
            "num_calibration_samples": len(tokens),
            "max_seq_length": tokens.shape[1],
        }
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    with torch.enable_grad():
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe(request), **data)
    seconds = round(time.monotonic() - started, 1)
    model.save_pretrained(request["checkpoint"], save_compressed=True)
    return seconds


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
    """The model with one Linear per expert, in its own dtype."""
    from llmcompressor.utils import load_context
    from transformers import AutoModelForCausalLM

    with load_context():
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def require_same_bytes(model: Any, checkpoint: Path) -> None:
    """SystemExit unless the packed tensors in memory are those of the files. Names may differ: see the README."""
    written = [tensor for path in checkpoint.glob("*.safetensors") for tensor in load_file(path).values()]
    if digests(written) != digests(list(model.state_dict().values())):
        raise SystemExit(f"the compressed model in memory is not what {checkpoint} holds")


def digests(tensors: list[torch.Tensor]) -> list[str]:
    packed = (torch.uint8, torch.int32, torch.float8_e4m3fn)
    kept = [
        tensor.contiguous().view(torch.uint8)
        for tensor in tensors
        if tensor.dtype in packed and tensor.dim() == 2
    ]
    return sorted(hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in kept)


def in_float32(model: Any) -> Any:
    """Decode what is compressed and compute in float32, inputs quantized on the way.

    compressed-tensors decodes at the first forward, into bfloat16; a second rounding that no kernel does. Floating
    scales and float32 codes keep it out, in the peer's favour.
    """
    from compressed_tensors.compressors.nvfp4 import base
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    base.unpack_fp4_from_uint8 = partial(unpack_fp4_from_uint8, dtype=torch.float32)
    torch.nn.Module.float(model)
    model.eval()
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    left = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if left:
        raise SystemExit(f"the model was not decoded into float32: {left}")
    return model


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}


if __name__ == "__main__":
    main()
