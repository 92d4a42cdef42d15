"""Choosing NVFP4 weight scales on a CPU, against ModelOpt's sweep over the same 126 scales, in one run.

    python benchmarks/scale_search.py [--rounds 3]

Ours: ``choose_scales`` over matrices of 100 million weights in all, for each search. ModelOpt: its preset
``NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG`` on 4 million weights (its sweep needs CUDA; two kernels are replaced by plain
torch as in ``benchmarks/accuracy``), which also has to insert quantizers: little beside the sweep. Reported are
nanoseconds per weight, medians over rounds taken in turn, and whether both chose equally good scales.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "scale_search.json"
SIZE, OURS, THEIRS = 2048, 24, 1
"""Width of the square matrices, and how many of them are searched: 100.7 and 4.2 million weights."""
METHODS = ("four_over_six", "window", "mse", "local_hessian")


def ours(method: str) -> float:
    """Seconds for all matrices."""
    import torch

    from toolchain.codecs import e2m1
    from toolchain.quantize.accuracy.grids import Nvfp4Grid
    from toolchain.quantize.accuracy.scale_search import choose_scales

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    hessian = torch.eye(e2m1.BLOCK).expand(SIZE // e2m1.BLOCK, -1, -1).contiguous()
    grid = Nvfp4Grid(e2m1.global_scale(weight.abs().amax()))
    started = time.monotonic()
    for _ in range(OURS):
        choose_scales(weight, grid, method, hessian if method == "local_hessian" else None)
    return time.monotonic() - started


def theirs() -> tuple[float, float, float]:
    """(seconds, squared error of ModelOpt's choice, squared error of ours) on the same matrix."""
    import modelopt.torch.quantization as mtq
    import torch

    from benchmarks.accuracy import nvfp4_on_cpu
    from toolchain.codecs import e2m1
    from toolchain.quantize.accuracy.grids import Nvfp4Grid
    from toolchain.quantize.accuracy.scale_search import block_error, choose_scales

    nvfp4_on_cpu.install()
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(THEIRS)))
    weight = model[0].weight.detach().clone()
    config = mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG
    inputs = torch.randn(4, SIZE)
    started = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(model, config, lambda found: found(inputs))
        seconds = time.monotonic() - started
        error = float((model[0].weight_quantizer(weight) - weight).square().sum())
    grid = Nvfp4Grid(e2m1.global_scale(weight.abs().amax()))
    blocks = weight.unflatten(-1, (-1, e2m1.BLOCK))
    mine = float(block_error(blocks, grid, choose_scales(weight, grid, "mse"), None).sum())
    return seconds, error, mine


def measure(rounds: int) -> dict[str, Any]:
    weights = SIZE * SIZE
    seconds: dict[str, list[float]] = {method: [] for method in (*METHODS, "modelopt mse")}
    error = mine = 0.0
    for _ in range(rounds):
        for method in METHODS:
            seconds[method].append(ours(method) / (OURS * weights))
        taken, error, mine = theirs()
        seconds["modelopt mse"].append(taken / (THEIRS * weights))
    ns = {name: round(statistics.median(values) * 1e9, 2) for name, values in seconds.items()}
    return {
        "nanoseconds_per_weight": ns,
        "seconds_per_100m_weights": {name: round(value / 10, 2) for name, value in ns.items()},
        "modelopt_mse_over_ours": round(ns["modelopt mse"] / ns["mse"], 1),
        "squared_error": {"modelopt mse": error, "ours mse": mine},
        "rounds": rounds,
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    found = {
        **measure(parser.parse_args().rounds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
