"""What training under fake quantization gives back, and how much of it is mere extra training, on the demo model.

    python -m benchmarks.qat run [--formats int4_awq nvfp4]
    python -m benchmarks.qat table

Every engine is made by the commands themselves (``toolchain engine``, ``toolchain qat``); its written bytes are loaded
again and judged on those documents of the demo's evaluation text that share nothing with its training text (modules of
the standard library copy from each other). Rows:

- ``ptq``: the format's default recipe, nothing trained; ``ptq`` and a name: the recipe that training starts from;
- ``qad``: distilled from the unquantized model; ``qad-lora``: by adapters; ``qat``: next-token cross entropy;
- ``control``, beside ``qat`` of the last format: the *unquantized* model trained on the same text, in the same order,
  with the same steps and learning rate, by next-token cross entropy. What it gains in perplexity is what the text gives
  to any model, and its KL is how far these steps carry a model that had nothing to recover. (Distilled from itself it
  would not move: its KL and its gradient are zero.)

KL is that of the unquantized, untouched model to the row's model, in nats per token. ``minutes`` is the whole command:
calibration, training, export, audit, evaluation, repository.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "qat.json"
TRAINED = ("routed_expert", "attention", "norm", "lm_head")
MATRICES = ("routed_expert", "attention")
"""What adapters are put on."""
LENGTH = 128
SETTINGS = (
    "--length", str(LENGTH), "--batch-size", "8", "--evaluate-every", "550", "--held-out-tokens", "8192",
    "--patience", "0",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Amount:
    steps: int
    rate: float
    recipe: str | None = None
    """What training starts from; None: the format's default."""
    options: tuple[str, ...] = ()


AMOUNTS = {
    "nvfp4": Amount(
        steps=1650,
        rate=3e-4,
        recipe="arrange+compensate+local_hessian+gptq",
        options=("--router-weight", "3"),
    )
}
"""Where rounded activations make most of the gap, training has to find weights that bear them, which takes longer than
finding weights that lie well on the grid; and no training moves channels between blocks."""
OTHER_AMOUNT = Amount(steps=400, rate=2e-4)
LORA_RATE = 1e-3
METHODS: dict[str, tuple[str, ...]] = {
    "qad": ("--method", "qad"),
    "qad-lora": ("--method", "qad", "--lora"),
    "qat": ("--method", "qat"),
}
MOST_COPIED = 0.01
"""Largest share of a document's runs of 32 tokens that may stand in the training text, too."""


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Path
    place: Path
    """Where engines are made."""
    eval_tokens: int
    seed: int = 0

    @property
    def train_text(self) -> Path:
        return self.model / "calibration.jsonl"

    @property
    def text(self) -> Path:
        return self.place / "unseen.jsonl"


def toolchain(*arguments: str) -> float:
    """Run the command; returns its seconds."""
    started = time.monotonic()
    command = [sys.executable, "-c", "from toolchain.cli.main import main; main()", *arguments, "--json"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - started, 1)


def write_unseen(run: Run) -> int:
    """The evaluation documents of which nothing is copied from the training text; returns how many."""
    from transformers import AutoTokenizer

    from toolchain.data.overlap import copied_fraction

    tokenizer = AutoTokenizer.from_pretrained(run.model)

    def read(path: Path) -> list[tuple[str, np.ndarray]]:
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        return [(text, np.asarray(tokenizer(text, add_special_tokens=False).input_ids)) for text in texts]

    known = [ids for _, ids in read(run.train_text)]
    kept = [
        text
        for text, ids in read(run.model / "evaluation.jsonl")
        if len(ids) >= 32 and copied_fraction(known, ids) <= MOST_COPIED
    ]
    run.text.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    return len(kept)


def quantize(run: Run, format_name: str, recipe: str | None = None) -> dict[str, Any]:
    """The row of the format without training."""
    name = f"ptq {recipe}" if recipe else "ptq"
    engine = run.place / f"{format_name}-{name}"
    seconds = toolchain(
        "engine", str(run.model), "--format", format_name, "--output", str(engine), *judging(run),
        *(["--recipe", recipe] if recipe else []),
    )  # fmt: skip
    return {"format": format_name, "row": name, "seconds": seconds, **judge(run, engine)}


def train(run: Run, format_name: str, name: str) -> dict[str, Any]:
    """The row of one method, from the engine of ``quantize``."""
    from toolchain.formats import get_format

    method = METHODS[name]
    lora = "--lora" in method
    roles = [part for role in (MATRICES if lora else TRAINED) for part in ("--train", role)]
    found = amount(format_name)
    from_row = f"ptq {found.recipe}" if found.recipe else "ptq"
    start, engine = run.place / f"{format_name}-{from_row}", run.place / f"{format_name}-{name}"
    seconds = toolchain(
        "qat", str(start), "--data", str(run.train_text), "--output", str(engine), *method, *roles, *judging(run),
        *SETTINGS, "--steps", str(found.steps), "--learning-rate", str(LORA_RATE if lora else found.rate),
        "--seed", str(run.seed), *(() if name == "qat" else found.options),  # those are of distillation
        *(["--learned-scales"] if get_format(format_name).learned_scales and not lora else []),
    )  # fmt: skip
    return {"format": format_name, "row": name, "seconds": seconds, **judge(run, engine)}


def amount(format_name: str) -> Amount:
    return AMOUNTS.get(format_name, OTHER_AMOUNT)


def judging(run: Run) -> tuple[str, ...]:
    return ("--eval-tokens", str(run.eval_tokens), "--eval-data", str(run.text))


def judge(run: Run, engine: Path) -> dict[str, Any]:
    """The written bytes on the unseen text, by the training's own measure and as ``toolchain evaluate`` found it."""
    import torch

    from toolchain.modeling.loading import load_checkpoint, load_source
    from toolchain.qat.heldout import Judged, measure_held_out

    cpu = torch.device("cpu")
    student = load_checkpoint(engine / "checkpoint", device=cpu, dtype=torch.float32)
    teacher = load_source(run.model, device=cpu, dtype=torch.float32)
    figures = measure_held_out(
        Judged(run=student, inner=student), Judged(run=teacher, inner=teacher), sequences(run), device=cpu
    )
    metrics = json.loads((engine / "metrics.json").read_text())
    training = json.loads((engine / "checkpoint" / "quantize.json").read_text()).get("training") or {}
    told = ("steps", "best_step", "tokens", "seconds", "stopped", "improved")
    kept = ("kl_mean", "ppl", "baseline_ppl", "router_agreement", "top1_agreement", "tokens")
    return {
        **figures,
        "evaluate": {name: metrics.get(name) for name in kept},
        "intervals": {name: metrics["intervals"].get(name) for name in kept if name in metrics["intervals"]},
        "training": {key: training.get(key) for key in told},
    }


def sequences(run: Run) -> Any:
    """int64 [n, LENGTH] of the unseen text."""
    from toolchain.core.progress import Silent
    from toolchain.plan.steps import Training
    from toolchain.qat.data import load_sequences

    asked = Training(
        data=(str(run.train_text),), held_out=(str(run.text),), held_out_tokens=run.eval_tokens, length_tokens=LENGTH
    )  # fmt: skip
    return load_sequences(asked, run.model, Silent()).held_out


def control(run: Run, engine: Path) -> dict[str, Any]:
    """The unquantized model trained as ``engine`` was."""
    from toolchain.plan.types import Plan
    from toolchain.qat.control import train_control

    plan = Plan.from_json(json.loads((engine / "plan.json").read_text()))
    if plan.training is None:
        raise SystemExit(f"{engine} was not trained")
    training = replace(plan.training, held_out=(str(run.text),), held_out_tokens=run.eval_tokens)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        done = train_control(replace(plan, training=training), Path(work), device="cpu")
    seconds = round(time.monotonic() - started, 1)
    return {
        "format": "source",
        "row": "control",
        "seconds": seconds,
        "before": done["before"],
        **done["after"],
    }


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| format | what | KL x 1000 | of the gap closed | router agreement | perplexity | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    start = {row["format"]: row for row in rows if row["row"] == "ptq"}
    lines += [
        f"| source | untouched | 0 | | | {row['before']['ppl']:.2f} | |"
        for row in rows
        if row["row"] == "control"
    ]
    names = dict.fromkeys(row["row"] for row in rows if row["row"].startswith("ptq"))
    order = {name: index for index, name in enumerate([*names, *METHODS, "control"])}
    formats = [*dict.fromkeys(row["format"] for row in rows if row["row"] != "control"), "source"]
    for row in sorted(rows, key=lambda row: (formats.index(row["format"]), order[row["row"]])):
        gap = start.get(row["format"])
        closed = f"{1 - row['kl'] / gap['kl']:.0%}" if gap is not None and row is not gap else ""
        lines.append(
            f"| {row['format']} | {row['row']} | {1000 * row['kl']:.2f} | {closed} | {row['router']:.2%} | "
            f"{row['ppl']:.2f} | {row['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def run_all(options: argparse.Namespace) -> None:
    """Row by row into the result file, those that the question is about first."""
    with tempfile.TemporaryDirectory() as place:
        run = Run(model=options.model.resolve(), place=Path(place), eval_tokens=options.eval_tokens)
        settings = {
            "amounts": {name: asdict(amount(name)) for name in options.formats},
            "learning rate of adapters": LORA_RATE,
            "options": SETTINGS,
            "roles": TRAINED,
            "roles of adapters": MATRICES,
            "documents": write_unseen(run),
            "eval_tokens": run.eval_tokens,
        }
        rows: list[dict[str, Any]] = []
        for format_name in options.formats:
            keep(options, settings, rows, quantize(run, format_name))
            if amount(format_name).recipe:
                keep(options, settings, rows, quantize(run, format_name, amount(format_name).recipe))
            keep(options, settings, rows, train(run, format_name, "qad"))
        last = options.formats[-1]
        keep(options, settings, rows, train(run, last, "qat"))
        keep(options, settings, rows, control(run, run.place / f"{last}-qat"))
        keep(options, settings, rows, train(run, last, "qad-lora"))
    print(render(rows))


def keep(
    options: argparse.Namespace, settings: dict[str, Any], rows: list[dict[str, Any]], row: dict[str, Any]
) -> None:
    from toolchain.core.environment import package_versions
    from toolchain.core.files import atomic_write_json

    rows.append(row)
    print(json.dumps(row), flush=True)
    document = {
        "model": options.model.name,
        "settings": settings,
        "rows": rows,
        "versions": package_versions(),
    }
    atomic_write_json(options.output, document)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "demo-moe")
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "int4_awq"])
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.action == "table":
        print(render(json.loads(options.output.read_text())["rows"]))
        return
    if not (options.model / "evaluation.jsonl").is_file():
        parser.error(f"{options.model} has no evaluation.jsonl: run `make demo` first")
    run_all(options)


if __name__ == "__main__":
    main()
