"""What a training writes down while it runs: ``metrics.jsonl``, TensorBoard, and what people see."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from toolchain.core.files import atomic_write_text
from toolchain.core.progress import Progress
from toolchain.qat.files import METRICS, TENSORBOARD

HELD_OUT = "held_out"
"""``kind`` of a line that an evaluation wrote; those of optimizer steps are ``step``."""


class MetricsLog:
    """One JSON object per line, appended as things happen: ``kind``, ``step`` and figures."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS

    def truncate(self, step: int | None) -> None:
        """Drop what came after ``step`` (all for None), and a line that a kill cut off."""
        lines = [json.dumps(line) for line in self.lines() if step is not None and line["step"] <= step]
        atomic_write_text(self.path, "".join(f"{line}\n" for line in lines))

    def append(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Every whole line."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def held_out(self) -> dict[int, dict[str, float]]:
        """Step -> figures, of every evaluation so far."""
        return {
            line["step"]: {
                name: value for name, value in line.items() if name not in ("kind", "step", "seconds")
            }
            for line in self.lines()
            if line["kind"] == HELD_OUT
        }


class Recorder(TrainerCallback):
    """Writes ``metrics.jsonl`` and moves the progress bar; on the first process only."""

    def __init__(self, log: MetricsLog, progress: Progress) -> None:
        self.log, self.progress = log, progress
        self._bar: Iterator[int] = iter(())
        self._began, self._tokens = time.monotonic(), 0
        self._losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            left = state.max_steps - state.global_step
            self._bar = self.progress.track(range(left), description="train", total=left)
            next(self._bar, None)
        self._tokens = state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            next(self._bar, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        tokens = state.num_input_tokens_seen
        figures = {name: logs.get(name) for name in ("loss", "learning_rate", "grad_norm")}
        seconds = round(time.monotonic() - self._began, 4)
        self.log.append(
            "step", state.global_step, {**figures, "seconds": seconds, "tokens": tokens - self._tokens}
        )
        self._tokens = tokens
        self._losses.append(logs["loss"])

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        figures = {
            name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")
        }
        self.log.append(HELD_OUT, state.global_step, figures)
        self.progress.note(_sentence(state, figures, self._losses))
        self._losses = []

    def close(self) -> None:
        """End the bar, also where the training was broken off."""
        getattr(self._bar, "close", lambda: None)()


def _sentence(state: Any, figures: dict[str, float], losses: list[float]) -> str:
    """``step 50 of 600: loss 0.0123; held-out KL 0.0112 (best 0.0120), top-1 95.1 %, routers 96.0 %``."""
    parts = []
    if "kl" in figures:
        parts.append(f"KL {figures['kl']:.4g}")
    parts.append(f"perplexity {figures['ppl']:.4g}")
    parts += [
        f"{title} {figures[name]:.1%}"
        for name, title in (("top1", "top-1"), ("router", "routers"))
        if name in figures
    ]
    best = f" (best so far {state.best_metric:.4g})" if state.best_metric is not None else ""
    loss = f"loss {sum(losses) / len(losses):.4g}; " if losses else ""
    return f"step {state.global_step} of {state.max_steps}: {loss}held-out {', '.join(parts)}{best}"


def tensorboard(directory: Path, step: int | None) -> TrainerCallback:
    """Curves below ``directory``/tensorboard; those after ``step`` are hidden, since a resumed run draws them anew."""
    from torch.utils.tensorboard import SummaryWriter

    purge = None if step is None else step + 1
    return TensorBoardCallback(SummaryWriter(log_dir=str(directory / TENSORBOARD), purge_step=purge))
