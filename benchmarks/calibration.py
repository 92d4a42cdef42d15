"""Which samples to calibrate on: random against expert-balanced, at equal sample count, on the demo model.

    python benchmarks/calibration.py [--model build/demo-moe] [--seeds 5] [--formats nvfp4 int4_awq]

Every run is the toolchain's own quantize and evaluate. Three ways to choose the samples:

- ``random``: the toolchain's default, the first windows of the documents in seeded order;
- ``pool``: drawn evenly at random from the pool that ``balanced`` chooses from (four times the samples). It is no
  option of the toolchain: it tells apart what balance does from what text of more documents does;
- ``balanced``: ``--sampling balanced``.

Reported per format and size: coverage on the calibration text (smallest token count of any expert, mean coefficient of
variation over layers), KL and perplexity on held-out text, mean and standard deviation over seeds, and the paired
difference to ``random`` with its 95 % interval (Student's t). A difference whose interval holds 0 is called noise.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "calibration.json"
METHODS = ("random", "pool", "balanced")
SIZES = ((4, 128), (32, 512))
"""(samples, tokens of each): scarce, where experts stay short of tokens, and plenty."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantile of Student's t for the mean of n values (n - 1 degrees of freedom)."""
FIGURES = ("kl_mean", "ppl", "min", "cv")


def from_pool(seed: int) -> Callable[..., Any]:
    """Stands in for ``toolchain.quantize.sampling.select``: as many samples, evenly at random from the pool."""

    def select(pool: Any, settings: Any, **_: Any) -> list[int]:
        return sorted(random.Random(seed).sample(range(len(pool.tokens)), settings.samples))

    return select


def measure(
    model: Path, format_name: str, method: str, seed: int, size: tuple[int, int], tokens: int
) -> dict[str, Any]:
    """Quantize and evaluate once."""
    from toolchain.evaluate.checkpoint import evaluate_checkpoint
    from toolchain.models.reader import read_model
    from toolchain.plan.planner import make_plan, require_clean
    from toolchain.plan.types import Calibration
    from toolchain.quantize import job

    calibration = Calibration(
        data="",
        samples=size[0],
        length_tokens=size[1],
        seed=seed,
        sampling="random" if method == "random" else "balanced",
    )
    plan = require_clean(make_plan(read_model(str(model)), format=format_name, calibration=calibration))
    chosen: AbstractContextManager[Any] = nullcontext()
    if method == "pool":
        chosen = mock.patch.object(job, "select", from_pool(seed))
    with tempfile.TemporaryDirectory() as directory, chosen:
        output = Path(directory) / "checkpoint"
        started = time.monotonic()
        manifest = job.quantize(plan, output, device="cpu")
        seconds = time.monotonic() - started
        metrics = evaluate_checkpoint(
            output,
            baseline=model,
            data=model / "evaluation.jsonl",
            max_tokens=tokens,
            device="cpu",
            generations=0,
        )
        shutil.rmtree(output)
    coverage = manifest["coverage"]
    return {
        "format": format_name,
        "method": method,
        "seed": seed,
        "samples": size[0],
        "length_tokens": size[1],
        "min": coverage["min"],
        "cv": coverage["cv"],
        "starved": coverage["starved"],
        "kl_mean": metrics["kl_mean"],
        "ppl": metrics["ppl"],
        "baseline_ppl": metrics["baseline_ppl"],
        "evaluated_tokens": metrics["tokens"],
        "seconds": round(seconds, 2),
        "tokens_sha256": manifest["calibration"]["tokens_sha256"],
    }


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per format, size and method."""
    rows = []
    for key in sorted({(run["format"], run["samples"], run["length_tokens"]) for run in runs}):
        group = [run for run in runs if (run["format"], run["samples"], run["length_tokens"]) == key]
        base = {run["seed"]: run for run in group if run["method"] == "random"}
        for method in METHODS:
            mine = [run for run in group if run["method"] == method]
            row: dict[str, Any] = {"format": key[0], "samples": key[1], "length_tokens": key[2]}
            row |= {"method": method, "seeds": len(mine)}
            for figure in FIGURES:
                row[figure] = _spread([run[figure] for run in mine])
                row[f"{figure}_minus_random"] = _interval(
                    [run[figure] - base[run["seed"]][figure] for run in mine]
                )
            rows.append(row)
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def _interval(differences: list[float]) -> dict[str, Any]:
    """Mean, half width of its 95 % interval, and whether 0 lies within."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2 or not any(differences):
        return {"mean": mean, "half_width": None, "noise": True}
    half = T_95[min(count, max(T_95))] * statistics.stdev(differences) / count**0.5
    return {"mean": mean, "half_width": half, "noise": abs(mean) <= half}


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "format     samples    method    min tokens     CV          KL x 1000          KL - random, 95 %      verdict"
    ]
    for row in rows:
        change = row["kl_mean_minus_random"]
        if row["method"] == "random":
            verdict, shown = "", ""
        else:
            half = change["half_width"] or 0.0
            shown = f"{1000 * change['mean']:+.3f} +- {1000 * half:.3f}"
            verdict = "noise" if change["noise"] else ("better" if change["mean"] < 0 else "worse")
        lines.append(
            f"{row['format']:<10} {row['samples']:>3} x {row['length_tokens']:<4} {row['method']:<9} "
            f"{row['min']['mean']:>7.1f} ({row['min']['sd']:.1f})  {row['cv']['mean']:.3f}  "
            f"{1000 * row['kl_mean']['mean']:>9.3f} ({1000 * row['kl_mean']['sd']:.3f})  {shown:<22} {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "demo-moe")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "int4_awq"])
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if not (options.model / "evaluation.jsonl").is_file():
        parser.error(f"{options.model} has no evaluation.jsonl: run `make demo` first")
    runs = []
    for size in SIZES:
        for format_name in options.formats:
            for seed in range(options.seeds):
                for method in METHODS:
                    run = measure(options.model, format_name, method, seed, size, options.eval_tokens)
                    runs.append(run)
                    print(json.dumps(run), flush=True)
    rows = summarise(runs)
    from toolchain.core.environment import package_versions
    from toolchain.core.files import atomic_write_json

    atomic_write_json(
        options.output,
        {"model": options.model.name, "rows": rows, "runs": runs, "versions": package_versions()},
    )
    print(render(rows))


if __name__ == "__main__":
    main()
