"""What a training says about itself: the record beside its weights, and the sentence at its end."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from toolchain.core.environment import package_versions, peak_memory_bytes
from toolchain.core.progress import Progress
from toolchain.plan.steps import Training
from toolchain.qat.session import Session
from toolchain.qat.teacher import needs_teacher


def deciding_metric(training: Training) -> str:
    """Held-out figure that the best weights and early stopping go by: lower is better."""
    return "kl" if needs_teacher(training) else "ce"


def make_record(
    session: Session, training: Training, data: dict[str, Any], *, planned_steps: int, stopped: str
) -> dict[str, Any]:
    """What was done, on what, and what it gave, from the files of ``session``.

    ``held_out``: figures ``before`` the first step and at the ``best`` one, by the weights in memory; the caller adds
    those ``after``, of the weights as they are stored.
    """
    state, lines, evaluations = session.state(), session.metrics.lines(), session.metrics.held_out()
    steps = [line for line in lines if line["kind"] == "step"]
    best = int(state["best_global_step"] or 0)
    tail = steps[-max(1, len(steps) // 10) :]
    return {
        "schema_version": 1,
        "method": training.method,
        "teacher": (training.teacher or "source") if needs_teacher(training) else None,
        "steps": int(state["global_step"]),
        "planned_steps": planned_steps,
        "stopped": stopped,
        "epochs": round(float(state["epoch"] or 0), 4),
        "tokens": int(state["num_input_tokens_seen"]),
        "best_step": best,
        "metric": deciding_metric(training),
        "held_out": {"before": evaluations[0], "best": evaluations[best]},
        "curve": [{"step": step, **figures} for step, figures in sorted(evaluations.items())],
        "loss": {
            "first": steps[0]["loss"] if steps else None,
            "last_tenth": sum(line["loss"] for line in tail) / len(tail) if tail else None,
        },
        "data": data,
        "settings": asdict(training),
        "seconds": {"steps": round(sum(line["seconds"] for line in steps), 2)},
        "peak_memory_bytes": _peaks(),
        "versions": package_versions(),
    }


def _peaks() -> dict[str, int]:
    peaks = {"host": peak_memory_bytes()}
    return {**peaks, "device": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else peaks


def tell(record: dict[str, Any], progress: Progress) -> None:
    """The gain; or, so that nobody overlooks it, that there is none."""
    metric, figures = record["metric"], record["held_out"]
    change = f"held-out {metric.upper()} {figures['before'][metric]:.4g} before training"
    if record["improved"]:
        progress.note(
            f"{change}, {figures['after'][metric]:.4g} after (best step {record['best_step']} of {record['steps']})"
        )
        return
    best = f"{figures['best'][metric]:.4g} at best, {figures['trained'][metric]:.4g} as stored"
    progress.note(
        f"WARNING: training gained nothing: {change}, {best}. The weights of the start are written. Try another "
        f"--learning-rate, more steps, or other data"
    )
