"""How a long row of tokens is cut into windows, and which of their tokens are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from toolchain.core.errors import UsageError

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 512 * 1024**2
"""Aim for the float32 logits of one batch when no batch size is given."""


@dataclass(frozen=True, kw_only=True)
class Window:
    start: int
    """First token of the window."""
    first_scored: int
    """First token whose probability counts; those before it are context."""
    end: int
    """One past the last token."""
    fresh: int
    """First token that no earlier window holds: what is measured per position (routing, hidden states) counts from
    here, so that no token counts twice."""


@dataclass(frozen=True, kw_only=True)
class WindowBatch:
    """Windows of the same geometry."""

    input_ids: torch.Tensor
    """[B, T] int64, BOS included if there is one."""
    first: int
    """Position of ``input_ids`` that the first scored token is at; its logits are one position earlier."""
    fresh: int
    """Position of the first token that no earlier window holds; BOS never counts."""

    def targets(self) -> torch.Tensor:
        """[B * n] ids of the scored tokens."""
        return self.input_ids[:, self.first :].reshape(-1)

    def predictions(self, logits: torch.Tensor) -> torch.Tensor:
        """[B * n, V] of ``logits`` [B, T, V]: the distributions that the scored tokens are drawn from."""
        return logits[:, self.first - 1 : -1].reshape(-1, logits.shape[-1])


def cut(tokens: int, *, window: int, stride: int, bos: bool) -> list[Window]:
    """Windows over ``tokens`` tokens, one every ``stride``; each token is scored once, in the first window
    that holds it. Without BOS the first token of a window that has no context is not scored.

    Raises UsageError (TC-523) for settings that score nothing.
    """
    if window < 2 or not 1 <= stride <= window or tokens < 2:
        raise UsageError(
            f"cannot evaluate {tokens} tokens with window {window} and stride {stride}",
            hint="window >= 2, 1 <= stride <= window, and at least two tokens",
            code="TC-523",
        )
    windows: list[Window] = []
    scored = 0
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        first = max(scored, start if bos else start + 1)
        if first < end:
            windows.append(Window(start=start, first_scored=first, end=end, fresh=max(scored, start)))
        scored = end
        if end == tokens:
            break
    return windows


def batches(
    token_ids: Sequence[int],
    windows: Sequence[Window],
    *,
    bos: int | None,
    batch_size: int,
) -> Iterator[WindowBatch]:
    """Batches of neighbouring windows of the same length and context: no padding, so no mask is needed."""
    import torch

    prefix = [] if bos is None else [bos]
    for (_, first, fresh), group in groupby(windows, _geometry):
        rows = [prefix + list(token_ids[item.start : item.end]) for item in group]
        for at in range(0, len(rows), batch_size):
            ids = torch.tensor(rows[at : at + batch_size])
            yield WindowBatch(input_ids=ids, first=first + len(prefix), fresh=fresh + len(prefix))


def _geometry(window: Window) -> tuple[int, int, int]:
    """Length and context of a window."""
    return window.end - window.start, window.first_scored - window.start, window.fresh - window.start


def count_batches(windows: Sequence[Window], batch_size: int) -> int:
    """How many batches ``batches`` makes, for a progress bar."""
    return sum(-(-len(list(group)) // batch_size) for _, group in groupby(windows, _geometry))


def fitting_batch_size(window: int, vocab_size: int, *, kept_bytes: int = 0) -> int:
    """Rows whose float32 logits, and ``kept_bytes`` more per token, stay within ``LOGITS_BYTES``, 1 to 8."""
    return max(1, min(8, LOGITS_BYTES // (window * (4 * vocab_size + kept_bytes))))
