"""What training under fake quantization gives back, and how much of it is mere extra training, on the demo model.

    python -m benchmarks.qat run [--formats nvfp4 int4_awq] [--steps 400] [--seeds 1]
    python -m benchmarks.qat table

Every engine is made by the command itself (``toolchain engine``, ``toolchain qat``); its written bytes are loaded again
and judged on the demo's evaluation text, which neither the demo's own training nor this one has seen. Rows:

- ``ptq``: the format's default recipe, nothing trained;
- ``qad``: distilled from the unquantized model; ``qat``: next-token cross entropy; ``qad-lora``: by adapters;
- ``control``: the *unquantized* model trained on the same text, in the same order, with the same steps and learning
  rate, by next-token cross entropy. What it gains in perplexity is what the text gives to any model, and its KL is how
  far the same steps carry a model that had nothing to recover. (Distilled from itself it does not move: its KL and its
  gradient are zero.)

KL is that of the unquantized, untouched model to the row's model, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "qat.json"
SETTINGS = ("--length", "128", "--batch-size", "8", "--evaluate-every", "50")
METHODS: dict[str, tuple[str, ...]] = {
    "qad": ("--method", "qad"),
    "qat": ("--method", "qat"),
    "qad-lora": ("--method", "qad", "--lora"),
}


def toolchain(*arguments: str) -> float:
    """Run the command; returns its seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "toolchain.cli.main", *arguments, "--json"], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return round(time.monotonic() - started, 1)


def measure(
    model: Path, format_name: str, options: argparse.Namespace, seed: int, place: Path
) -> list[dict[str, Any]]:
    """All rows of one format."""
    ptq = place / f"{format_name}-ptq"
    common = ("--eval-tokens", str(options.eval_tokens))
    seconds = toolchain("engine", str(model), "--format", format_name, "--output", str(ptq), *common)
    rows = [
        {"format": format_name, "row": "ptq", "seed": seed, "seconds": seconds, **judge(ptq, model, options)}
    ]
    for name, method in METHODS.items():
        engine = place / f"{format_name}-{name}-{seed}"
        rate = options.lora_learning_rate if "--lora" in method else options.learning_rate
        seconds = toolchain(
            "qat", str(ptq), "--data", str(model / "calibration.jsonl"), "--output", str(engine), *method, *SETTINGS,
            "--steps", str(options.steps), "--learning-rate", str(rate), "--seed", str(seed), *common,
        )  # fmt: skip
        rows.append(
            {
                "format": format_name,
                "row": name,
                "seed": seed,
                "seconds": seconds,
                **judge(engine, model, options),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def judge(engine: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The written bytes on the evaluation text."""
    import torch

    from toolchain.modeling.loading import load_checkpoint, load_source
    from toolchain.qat.heldout import Judged, measure_held_out

    cpu = torch.device("cpu")
    student, teacher = load_checkpoint(engine / "checkpoint", device=cpu), load_source(model, device=cpu)
    sequences = evaluation(model, options)
    figures = measure_held_out(
        Judged(run=student, inner=student), Judged(run=teacher, inner=teacher), sequences, device=cpu
    )
    metrics = json.loads((engine / "metrics.json").read_text())
    manifest = json.loads((engine / "checkpoint" / "quantize.json").read_text())
    training = manifest.get("training") or {}
    return {
        **figures,
        "interval": {name: metrics["intervals"].get(name) for name in ("kl_mean", "router_agreement")},
        "metrics": {
            name: metrics.get(name) for name in ("kl_mean", "ppl", "baseline_ppl", "router_agreement")
        },
        "training": {
            key: training.get(key) for key in ("steps", "best_step", "tokens", "seconds", "stopped")
        },
        "audit": json.loads((engine / "verify.json").read_text()).get("passed"),
    }


def evaluation(model: Path, options: argparse.Namespace) -> Any:
    """int64 [n, 512] of the evaluation text."""
    from toolchain.plan.steps import Training
    from toolchain.qat.data import load_sequences

    training = Training(
        data=(str(model / "calibration.jsonl"),), held_out=(str(model / "evaluation.jsonl"),), length_tokens=512,
        held_out_tokens=options.eval_tokens,
    )  # fmt: skip
    from toolchain.core.progress import Silent

    return load_sequences(training, model, Silent()).held_out


def control(engine: Path, model: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The unquantized model trained as ``engine`` was, judged on the evaluation text."""
    from toolchain.plan.types import Plan
    from toolchain.qat.control import train_control

    plan = Plan.from_json(json.loads((engine / "plan.json").read_text()))
    assert plan.training is not None
    training = replace(
        plan.training, held_out=(str(model / "evaluation.jsonl"),), held_out_tokens=options.eval_tokens
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        done = train_control(replace(plan, training=training), Path(work), device="cpu")
    seconds = round(time.monotonic() - started, 1)
    return {
        "format": "source",
        "row": "control",
        "seed": seed,
        "seconds": seconds,
        "before": done["before"],
        **done["after"],
    }


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| format | what | KL x 1000 | share of the PTQ gap closed | router agreement | perplexity | minutes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    start = {row["format"]: row for row in rows if row["row"] == "ptq"}
    source = next((row["before"]["ppl"] for row in rows if row["row"] == "control"), None)
    if source is not None:
        lines.append(f"| source | untouched | 0 | | | {source:.3f} | |")
    for row in rows:
        gap = start.get(row["format"])
        closed = f"{1 - row['kl'] / gap['kl']:.0%}" if gap is not None and row["row"] != "ptq" else ""
        lines.append(
            f"| {row['format']} | {row['row']} | {1000 * row['kl']:.2f} | {closed} | {row['router']:.2%} | "
            f"{row['ppl']:.3f} | {row['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    from toolchain.core.environment import package_versions
    from toolchain.core.files import atomic_write_json

    model = options.model.resolve()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for seed in range(options.seeds):
            for format_name in options.formats:
                rows += measure(model, format_name, options, seed, Path(place))
            trained = Path(place) / f"{options.formats[0]}-qat-{seed}"
            rows.append(control(trained, model, options, seed))
            print(json.dumps(rows[-1]), flush=True)
    asked = {
        name: str(value) for name, value in vars(options).items() if name not in ("model", "output", "action")
    }
    atomic_write_json(
        options.output,
        {"model": model.name, "settings": asked, "rows": rows, "versions": package_versions()},
    )
    print(render(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "demo-moe")
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "int4_awq"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.action == "table":
        print(render(json.loads(options.output.read_text())["rows"]))
        return
    if not (options.model / "evaluation.jsonl").is_file():
        parser.error(f"{options.model} has no evaluation.jsonl: run `make demo` first")
    run(options)


if __name__ == "__main__":
    main()
