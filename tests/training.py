"""Plans that train, for tests: a tiny model, a few steps, text that every checkout has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.planning import TEXT, plan_for
from toolchain.plan.steps import Training
from toolchain.plan.types import Plan


def training_plan(model: Path, format: str = "nvfp4", **options: Any) -> Plan:
    """``plan_for`` with a training of 6 steps of 4 x 32 tokens in float32, judged every 3 steps."""
    settings: dict[str, Any] = dict(
        data=(str(TEXT),),
        held_out=(str(TEXT.parent / "formats"),),
        held_out_tokens=256,
        length_tokens=32,
        batch_size=4,
        steps=6,
        learning_rate=3e-4,
        warmup=0.0,
        precision="fp32",
        evaluate_every=3,
        patience=50,
    )
    return replace(plan_for(model, format), training=Training(**{**settings, **options}))


class Notes:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def track(self, items: Any, *, description: str, total: int | None = None) -> Any:
        yield from items

    def meter(self, *, description: str, total_bytes: int) -> Any:
        raise NotImplementedError
