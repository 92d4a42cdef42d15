"""Plain ModelOpt without data: load with transformers, quantize without a forward loop, export. A process of its own.

    python benchmarks/streaming/modelopt_plain.py SOURCE OUTPUT

``W4A16_NVFP4_CFG`` for the experts only (its wildcards narrowed as its own experts-only presets do): its W4A4 presets
need a forward pass. It imports nothing of this project. Sources in FP8 blocks cannot be measured: transformers 5.14
dequantizes no weight whose rows are no multiple of 128, and DeepSeek's ``kv_a_proj_with_mqa`` has 576.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    marks = [time.monotonic()]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    marks.append(time.monotonic())
    config: dict[str, Any] = copy.deepcopy(mtq.W4A16_NVFP4_CFG)
    for entry in config["quant_cfg"]:
        if entry.get("cfg") is not None and entry["quantizer_name"] == "*weight_quantizer":
            entry["quantizer_name"] = "*mlp.experts*weight_quantizer"
    mtq.quantize(model, config)
    marks.append(time.monotonic())
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=output)
    marks.append(time.monotonic())
    steps = [round(after - before, 1) for before, after in pairwise(marks)]
    print(json.dumps(dict(zip(("load", "quantize", "export"), steps, strict=True))))


if __name__ == "__main__":
    main()
