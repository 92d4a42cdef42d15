"""ModelOpt as its hf_ptq example configures it: the model as transformers loads it, a preset, a forward loop, export.

Judged by the exported bytes where the toolchain's reader can run them (the export merges scales of fused Linears, so
the model in memory is not what ships), else by the fake-quantized model in memory; the result says which, and why.
The KV cache is left alone for all methods.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import nvfp4_on_cpu
from benchmarks.accuracy.data import BATCH, calibration_tokens, load_plain, tokens_hash
from benchmarks.accuracy.judge import judge
from benchmarks.accuracy.methods import EXPERTS, Method
from benchmarks.accuracy.places import MODELS
from benchmarks.accuracy.stored import describe_stored

WILDCARDS = {
    "*weight_quantizer": "*.experts.*weight_quantizer",
    "*input_quantizer": "*.experts.*input_quantizer",
}
"""How ModelOpt's own experts-only presets differ from those of all Linears."""


def run(model: str, method: Method, seed: int, scratch: Path) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    nvfp4_on_cpu.install()
    nvfp4_on_cpu.check()
    tokens = calibration_tokens(model, seed)
    loaded = load_plain(model, "auto")

    def forward(quantized: Any) -> None:
        for batch in tokens.split(BATCH):
            quantized(input_ids=batch, use_cache=False)

    started = time.monotonic()
    mtq.quantize(loaded, configuration(method), forward)
    seconds = time.monotonic() - started
    result: dict[str, Any] = {"seconds": round(seconds, 1), "calibration_sha256": tokens_hash(tokens)}
    quantizers = sum(q.is_enabled for q in loaded.modules() if type(q).__name__.endswith("Quantizer"))
    result["enabled_quantizers"] = quantizers
    exported, reason = _export(loaded, scratch / "checkpoint")
    if exported is not None:
        result["stored"] = describe_stored(exported, MODELS / model)
        try:
            return {**result, "judged": "exported bytes", **judge(model, _reader(exported))}
        except Exception as error:  # noqa: BLE001 whatever the reader cannot do is reported beside the figures
            reason = f"our reader: {type(error).__name__}: {error}"
    return {**result, "judged": "in memory", "why": reason[:300], **judge(model, _in_memory(loaded))}


def configuration(method: Method) -> dict[str, Any]:
    """The preset's dictionary; for experts-only its wildcards are narrowed as ModelOpt's own presets do."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(getattr(mtq, method.settings["preset"]))
    config["algorithm"] = method.settings.get("algorithm", config["algorithm"])
    if method.policy == EXPERTS:
        for entry in config["quant_cfg"]:
            if entry.get("cfg") is not None:
                name = entry["quantizer_name"]
                entry["quantizer_name"] = WILDCARDS.get(name, name)
    return config


def _export(loaded: Any, directory: Path) -> tuple[Path | None, str]:
    from modelopt.torch.export import export_hf_checkpoint

    try:
        with torch.inference_mode():
            export_hf_checkpoint(copy.deepcopy(loaded), export_dir=directory)
    except Exception as error:  # noqa: BLE001 a failing export is one of the findings
        return None, f"ModelOpt's export: {type(error).__name__}: {error}"
    return directory, ""


def _reader(directory: Path) -> Any:
    from toolchain.modeling.loading import load_checkpoint

    read = load_checkpoint(directory, device=torch.device("cpu"), dtype=torch.float32)
    return lambda ids: read(input_ids=ids, use_cache=False).logits


def _in_memory(loaded: Any) -> Any:
    """BF16 weights computed in float32, like the reference."""
    loaded.to(torch.float32)
    return lambda ids: loaded(input_ids=ids, use_cache=False).logits
