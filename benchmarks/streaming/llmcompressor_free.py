"""llm-compressor's ``model_free_ptq`` on the same files, in its own environment: imports nothing of this project.

    PYTHON benchmarks/streaming/llmcompressor_free.py SOURCE OUTPUT

Scheme NVFP4A16 on the routed experts, like the others; its NVFP4 (W4A4) is refused without calibration. One worker, its
default: on two cores two workers took longer (torch uses both cores already). FP8 blocks are dequantized by its own
converter.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llmcompressor import model_free_ptq

KEPT = [
    "lm_head",
    "model.embed_tokens",
    "re:.*self_attn.*",
    "re:.*mlp[.]gate$",
    "re:.*shared_experts.*",
    "re:model[.]layers[.][0-9]+[.]mlp[.](gate|up|down)_proj$",
]


def main() -> None:
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    converter = None
    if "quantization_config" in json.loads((source / "config.json").read_text(encoding="utf-8")):
        from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

        converter = FP8BlockDequantizer(targets=["re:.*(_proj|kv_a_proj_with_mqa)$"])
    started = time.monotonic()
    model_free_ptq(source, output, scheme="NVFP4A16", ignore=KEPT, device="cpu", converter=converter)
    print(json.dumps({"quantize": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
