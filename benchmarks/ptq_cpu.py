"""PTQ speed on the CPU against plain ModelOpt, in one run: a 90M-parameter Qwen3-MoE, 32 x 512 calibration tokens.

    python benchmarks/ptq_cpu.py [--rounds 3] [--dtype float32]

Plain: ``mtq.quantize`` with ModelOpt's preset on the model as transformers loads it (fused experts), the forward loop
that its examples use, and, for NVFP4, the emulation backend that any CPU run of it needs. Ours: unfusing, calibration,
merged scales, AWQ over the experts too (plain ModelOpt leaves those rounded to nearest). Both quantize every Linear
that ModelOpt's preset covers; loading and export are left out of both. Each pair runs in processes of its own, in turn,
because ModelOpt's registrations are global to a process; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "ptq_cpu.json"
CONFIG: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
SAMPLES, LENGTH, BATCH = 32, 512, 4
TARGETS = {"nvfp4": 1.0, "int4_awq": 0.6}
PRESETS = {"nvfp4": "NVFP4_DEFAULT_CFG", "int4_awq": "INT4_AWQ_CFG"}


def make_model(directory: Path, dtype: str) -> int:
    """Write the random model; returns its parameters."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sys.path.insert(0, str(ROOT))
    from tests.tiny import write_tokenizer

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 123, (SAMPLES * LENGTH * 2,), generator=generator).tolist()
    (directory / "calibration.jsonl").write_text(json.dumps({"text": "".join(map(chr, letters))}) + "\n")
    return sum(parameter.numel() for parameter in model.parameters())


def plain(directory: Path, format_name: str) -> float:
    """Seconds of ModelOpt alone."""
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM

    from toolchain.plan.types import Calibration
    from toolchain.quantize import backend
    from toolchain.quantize.calibration import load_calibration

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", experts_implementation="eager"
    ).eval()
    data = load_calibration(Calibration(data="", samples=SAMPLES, length_tokens=LENGTH), directory)
    config = copy.deepcopy(getattr(mtq, PRESETS[format_name]))
    backend.register()
    for entry in config["quant_cfg"]:
        if format_name == "nvfp4" and isinstance(entry.get("cfg"), dict):
            entry["cfg"] = backend.adapt(entry["cfg"])

    @torch.no_grad()
    def forward(loaded: Any) -> None:
        for batch in data.batches(BATCH):
            loaded(batch)

    started = time.perf_counter()
    mtq.quantize(model, config, forward)
    return time.perf_counter() - started


def ours(directory: Path, format_name: str) -> float:
    """Seconds of our calibration: unfused experts, scales merged, ready to export."""
    import modelopt.torch.quantization  # noqa: F401 importing takes seconds and is in neither figure
    import transformers  # noqa: F401

    from toolchain.models.reader import read_model
    from toolchain.plan.planner import make_plan
    from toolchain.plan.types import Calibration
    from toolchain.quantize.job import calibrate

    calibration = Calibration(data="", samples=SAMPLES, length_tokens=LENGTH, batch_size=BATCH)
    plan = make_plan(
        read_model(str(directory)), format=format_name, policy="all-linear", calibration=calibration
    )
    return float(calibrate(plan, device="cpu").manifest["seconds"]["calibrate"])


def in_process(side: str, directory: Path, format_name: str) -> float:
    """Run one side in a fresh interpreter; its last line of output is the seconds."""
    command = [sys.executable, __file__, "--side", side, "--model", str(directory), "--format", format_name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--side", choices=["plain", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--format", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print({"plain": plain, "ours": ours}[options.side](options.model, options.format))
        return
    from toolchain.core.environment import package_versions

    result: dict[str, Any] = {
        "config": CONFIG,
        "samples": SAMPLES,
        "length_tokens": LENGTH,
        "dtype": options.dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        result["parameters"] = make_model(directory, options.dtype)
        for format_name, target in TARGETS.items():
            rounds = []
            for number in range(options.rounds):
                pair = {side: in_process(side, directory, format_name) for side in ("plain", "ours")}
                pair["ratio"] = pair["ours"] / pair["plain"]
                print(f"{format_name} round {number + 1}: {pair}", flush=True)
                rounds.append(pair)
            ratio = statistics.median(pair["ratio"] for pair in rounds)
            result[format_name] = {
                "rounds": rounds,
                "ratio_median": ratio,
                "target": target,
                "met": ratio <= target,
            }
            print(f"{format_name}: median ratio ours/plain {ratio:.2f}, target at most {target}")
    result["versions"] = package_versions()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
