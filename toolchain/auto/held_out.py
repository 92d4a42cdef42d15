"""Held-out windows: tokens to judge on that no range was taken from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.data.texts import read_texts
from toolchain.data.tokenizer import load_tokenizer
from toolchain.evaluate.tokens import begin_token, encode_samples, token_hash
from toolchain.plan.types import Calibration
from toolchain.quantize.calibration import load_calibration

EVAL_TOKENS = 4096
"""Default number of tokens to judge on."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    windows: torch.Tensor = field(repr=False)
    """[windows, length] int64, BOS included where the tokenizer puts one before every text."""
    identity: dict[str, Any]

    def part(self, index: int, parts: int) -> HeldOut:
        """Every ``parts``-th window, from ``index`` on: halves that were not judged on the same text."""
        windows = self.windows[index::parts]
        ids = windows[:, int(self.identity["bos"]) :].flatten().tolist()
        changed = {"windows": len(windows), "token_hash": token_hash(ids)}
        return HeldOut(windows=windows, identity={**self.identity, **changed})


def held_out(
    settings: Calibration,
    source: Path,
    *,
    data: Path | None,
    tokens: int,
    progress: Progress | None = None,
) -> HeldOut:
    """``tokens`` tokens of ``data``, or of the calibration text behind what calibration itself takes.

    Windows are as long as calibration samples. UsageError TC-220 when not even one window is left.
    """
    if tokens < 2:
        raise UsageError(f"--eval-tokens is {tokens}, expected at least 2", code="TC-523")
    tokenizer = load_tokenizer(source)
    length = min(settings.length_tokens, tokens)
    count = max(1, tokens // length)
    found = (
        _of_text(tokenizer, data, count, length)
        if data
        else _of_calibration(settings, source, count, progress or Silent())
    )
    if not len(found):
        raise UsageError(
            f"no held-out window of {length} tokens is left: calibration takes all of its text "
            f"({settings.samples} samples of {settings.length_tokens} tokens)",
            hint="give --data, fewer --calib-samples, or more calibration text",
            code="TC-220",
        )
    ids = found.flatten().tolist()
    bos = begin_token(tokenizer)
    windows = found if bos is None else torch.cat([torch.full((len(found), 1), bos), found], dim=1)
    identity = {
        "source": str(data) if data else "calibration text that calibration does not use",
        "windows": len(found),
        "length_tokens": found.shape[1],
        "bos": bos is not None,
        "token_hash": token_hash(ids),
    }
    return HeldOut(windows=windows, identity=identity)


def _of_text(tokenizer: Any, data: Path, count: int, length: int) -> torch.Tensor:
    ids = encode_samples(tokenizer, read_texts(data), max_tokens=count * length, window=length)
    whole = len(ids) // length
    return torch.tensor(ids[: whole * length], dtype=torch.int64).reshape(whole, length)


def _of_calibration(settings: Calibration, source: Path, count: int, progress: Progress) -> torch.Tensor:
    """Samples of a larger draw that no run of calibration could use: those behind its whole pool."""
    used = load_calibration(settings, source, progress).tokens
    more = replace(
        settings, samples=len(used) + count, sampling="random", min_tokens_per_expert=0, max_samples=1
    )
    drawn = load_calibration(more, source).tokens
    taken = {row.numpy().tobytes() for row in used}
    rows = [index for index, row in enumerate(drawn) if row.numpy().tobytes() not in taken]
    return drawn[rows[-count:]]
