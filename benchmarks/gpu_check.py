"""Everything that runs on a GPU, on the GPU: quantize -> export -> verify -> local runtime, compared with the CPU.

    make gpu-check            (or: python benchmarks/gpu_check.py [--device cuda] [--model DIR])

Needs an NVIDIA GPU, PyTorch with CUDA, transformers 5 and ModelOpt; no build step, no network. Writes
``benchmarks/results/gpu-<name of the GPU>.json`` and exits 1 when a comparison fails. Without ``--model`` a random
Qwen3-MoE of 90M parameters is made. For each format, with its own recipe and an FP8 KV cache:

* CUDA and CPU each quantize the same model with the same tokens. Scales come from maxima of bf16 activations, whose
  matmuls round differently, so weights must be equal bit for bit and input scales within 2 %. Not asked of recipes that
  search by output error (AWQ, GPTQ, SmoothQuant).
* The checkpoint made on CUDA passes the audit, and runs on CUDA and on the CPU: logits are compared in float32.
* Training (QAD, three steps, NVFP4 and INT4): losses of both devices in float32, then in bf16 on CUDA; the trained
  checkpoint passes its audit against the trained weights.
* The fused kernels (``benchmarks/kernels/check.py``): every format on random inputs against float64, poisoned outputs,
  CUDA graphs against plain runs, compute-sanitizer where it is installed.
* Seconds of calibration, export and of one forward pass, and peak GPU memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LOGIT_TOLERANCE = 2e-3
"""Relative RMS between devices in float32: different summation orders, and the few activations that they tip over a
rounding boundary."""
SCALE_TOLERANCE = 0.02


def quantized(source: Path, format_name: str, device: str, output: Path) -> dict[str, Any]:
    """Quantize on ``device``; returns the manifest's figures."""
    from toolchain.models.reader import read_model
    from toolchain.plan.planner import make_plan, require_clean
    from toolchain.plan.types import Calibration
    from toolchain.quantize.job import quantize

    plan = require_clean(
        make_plan(
            read_model(str(source)),
            format=format_name,
            policy="all-linear",
            kv_cache="fp8",
            calibration=Calibration(data="", samples=32, length_tokens=512),
        )
    )
    return quantize(plan, output, device=device)


def searched(format_name: str) -> bool:
    """Whether the format's own recipe chooses by output error: the devices then may choose differently in a tie."""
    from toolchain.formats import get_format

    return get_format(format_name).default_recipe != "max"


def compare_bytes(left: Path, right: Path) -> dict[str, Any]:
    """Share of equal packed weights and the largest relative difference of scales between two checkpoints."""
    from toolchain.checkpoint.reader import CheckpointReader

    ours, theirs = CheckpointReader(left), CheckpointReader(right)
    different = total = 0
    worst = 0.0
    for name, info in ours.infos.items():
        a, b = ours.get(name), theirs.get(name)
        if (name.endswith("scale") and info.dtype == "F32") or name.endswith("scale_2"):
            worst = max(worst, float(((a - b).abs() / b.abs()).max()))
        elif name.endswith(".weight"):
            different += int((a.float() != b.float()).sum())
            total += a.numel()
    return {"weights_different": different / total, "scale_worst_relative": worst}


def run(checkpoint: Path, device: str, tokens: Any) -> tuple[Any, float]:
    """Float32 logits on the CPU, and the seconds of a second forward pass."""
    import torch

    from toolchain.modeling.loading import load_checkpoint

    model = load_checkpoint(checkpoint, device=torch.device(device), dtype=torch.float32)
    with torch.no_grad():
        model(tokens.to(device))
        _wait(device)
        started = time.perf_counter()
        logits = model(tokens.to(device)).logits
        _wait(device)
    return logits.float().cpu(), time.perf_counter() - started


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def check_format(source: Path, format_name: str, device: str, folder: Path) -> dict[str, Any]:
    """All comparisons of one format; ``problems`` lists what failed."""
    import torch

    from toolchain.checkpoint.audit import audit

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    there = quantized(source, format_name, device, folder / f"{format_name}-gpu")
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
    here = quantized(source, format_name, "cpu", folder / f"{format_name}-cpu")
    verdict = audit(folder / f"{format_name}-gpu", against=source)
    bytes_compared = compare_bytes(folder / f"{format_name}-gpu", folder / f"{format_name}-cpu")
    tokens = torch.randint(4, 260, (4, 256), generator=torch.Generator().manual_seed(0))
    gpu_logits, gpu_seconds = run(folder / f"{format_name}-gpu", device, tokens)
    cpu_logits, cpu_seconds = run(folder / f"{format_name}-gpu", "cpu", tokens)
    error = float((gpu_logits - cpu_logits).norm() / cpu_logits.norm())
    problems = [str(finding) for finding in verdict.findings if finding.severity == "error"]
    if not searched(format_name) and bytes_compared["weights_different"] > 0:
        problems.append(
            f"{bytes_compared['weights_different']:.2%} of the packed weights differ from the CPU's"
        )
    if not searched(format_name) and bytes_compared["scale_worst_relative"] > SCALE_TOLERANCE:
        problems.append(f"scales differ by up to {bytes_compared['scale_worst_relative']:.2%}")
    if not error <= LOGIT_TOLERANCE:
        problems.append(f"logits differ by {error:.2e} relative RMS, tolerance {LOGIT_TOLERANCE:.0e}")
    return {
        "problems": problems,
        "logits_relative_rms": error,
        **bytes_compared,
        "seconds": {
            "gpu": there["seconds"],
            "cpu": here["seconds"],
            "forward_gpu": gpu_seconds,
            "forward_cpu": cpu_seconds,
        },
        "peak_gpu_bytes": peak,
    }


LOSS_TOLERANCE = 0.02
"""Relative, between devices: routers that a rounding tips send a token elsewhere."""


def check_training(source: Path, format_name: str, device: str, folder: Path) -> dict[str, Any]:
    """Three steps of distillation on ``device`` and on the CPU, on the same random documents."""
    from dataclasses import replace
    from random import Random

    import torch

    from toolchain.checkpoint.audit import audit
    from toolchain.models.reader import read_model
    from toolchain.plan.planner import make_plan, require_clean
    from toolchain.plan.steps import Training
    from toolchain.plan.types import Calibration
    from toolchain.qat.export import export_trained
    from toolchain.qat.job import train

    letters = Random(0)
    documents = ("".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=1024)) for _ in range(64))
    text = folder / "training.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    calibration = Calibration(data="", samples=8, length_tokens=256)
    plan = require_clean(make_plan(read_model(str(source)), format=format_name, calibration=calibration))
    asked = Training(
        data=(str(text),), steps=3, evaluate_every=2, length_tokens=256, batch_size=4,
        held_out_tokens=2048, patience=0, precision="fp32",
    )  # fmt: skip

    def losses(name: str, place: str, training: Training) -> tuple[Path, list[float]]:
        work, output = folder / f"{format_name}-{name}-work", folder / f"{format_name}-{name}"
        train(replace(plan, training=training), work, output, device=place)
        lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        return output, [line["loss"] for line in lines if line["kind"] == "step"]

    _, reference = losses("train-cpu", "cpu", asked)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    trained, found = losses("train-here", device, asked)
    seconds = time.monotonic() - started
    half = replace(asked, precision="bf16")
    _, in_bf16 = losses("train-bf16", device, half)
    checkpoint = folder / f"{format_name}-trained"
    export_trained(replace(plan, training=asked), trained, checkpoint, device=device)
    verdict = audit(checkpoint, against=trained)
    problems = [str(finding) for finding in verdict.findings if not verdict.passed]
    pairs = zip(reference, found, strict=True)
    worst = max(abs(one - other) / one for one, other in pairs)
    if worst > LOSS_TOLERANCE:
        problems.append(f"losses differ by {worst:.1%} between the devices: {reference} and {found}")
    return {
        "losses_cpu": reference,
        "losses": found,
        "losses_bf16": in_bf16,
        "worst_loss_difference": worst,
        "seconds": round(seconds, 2),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--model", type=Path, help="A model directory with calibration.jsonl. Default: a random one."
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here: nothing was checked, nothing was written\n")
        return 1
    from benchmarks.ptq_cpu import make_model
    from toolchain.core.environment import package_versions
    from toolchain.formats import FORMATS

    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu"
    target = options.output / f"gpu-{name.lower().replace(' ', '-')}.json"
    result: dict[str, Any] = {"device": name, "versions": package_versions(), "formats": {}}
    with tempfile.TemporaryDirectory() as folder:
        source = options.model or Path(folder) / "model"
        if options.model is None:
            make_model(source, "bfloat16")
        for format_name in (item.name for item in FORMATS):
            result["formats"][format_name] = check_format(source, format_name, options.device, Path(folder))
            print(format_name, json.dumps(result["formats"][format_name]), flush=True)
            _write(target, result)
        result["training"] = {}
        for format_name in ("nvfp4", "int4_awq"):
            found = check_training(source, format_name, options.device, Path(folder))
            result["training"][format_name] = found
            print("training", format_name, json.dumps(found), flush=True)
        _write(target, result)
    result["kernels"] = check_kernels(options.device)
    print("kernels", json.dumps(result["kernels"]), flush=True)
    every = [
        *result["formats"].items(),
        *(("kernels " + name, it) for name, it in result["kernels"].items()),
        *(("training " + name, it) for name, it in result["training"].items()),
    ]
    failed = [name for name, found in every if found["problems"]]
    result["passed"] = not failed
    _write(target, result)
    print(f"{'passed' if not failed else f'FAILED: {failed}'}; written to {target}")
    return 1 if failed else 0


def check_kernels(device: str) -> dict[str, Any]:
    """Of ``benchmarks.kernels``; nothing on a CPU, where `make test` runs the kernels in Triton's interpreter."""
    import torch

    if not device.startswith("cuda"):
        return {"check": {"ran": False, "why": "the fused kernels need a GPU", "problems": []}}
    from benchmarks.kernels.check import check, sanitize

    torch.cuda.set_device(device)  # Triton launches on the current one
    found: dict[str, Any] = {}
    for name, run in (("check", lambda: check(torch.device(device))), ("sanitizer", sanitize)):
        try:
            found[name] = {"problems": [], **run()}
        except Exception as error:  # noqa: BLE001 - what was found before is kept
            found[name] = {"problems": [f"{type(error).__name__}: {error}"]}
    return found


def _write(target: Path, result: dict[str, Any]) -> None:
    """After each part: a failure of one must not lose those before it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
