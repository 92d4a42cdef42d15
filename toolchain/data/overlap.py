"""Whether a model is judged on text that it was calibrated or trained on: a sketch of windows travels with the
checkpoint.

Every run of ``WINDOW`` tokens has a 64-bit hash; the ``KEPT`` smallest hashes of the tokens are kept
(a bottom-k sketch, Cohen and Kaplan 2007). Below the largest of them the sketch is complete, so windows of other tokens
that hash below it are looked up exactly, and the share of those that are found estimates the share of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 32
"""Tokens. Shorter runs recur in any two texts of a kind; licence headers and boilerplate do so at this length as well,
which is why a few per cent are no cause for alarm."""
KEPT = 512
KEPT_TRAINED = 4096
"""Of training text, of which there is more: with 10 million tokens, 16,384 others still meet about 7 kept hashes."""
ROWS_AT_ONCE = 1024
BOILERPLATE_ROWS, BOILERPLATE_SHARE = 4, 0.01
"""A window in so many rows, and in this share of all, is no copy of one document. Documents are distinct before."""
_BASE, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
"""Odd multipliers of the splitmix64 generator."""


def sketch(rows: np.ndarray, kept: int = KEPT) -> str:
    """[samples, length] token ids -> the smallest ``kept`` window hashes, 16 hexadecimal digits each, joined."""
    hashes = np.empty(0, dtype=np.uint64)
    for at in range(0, len(rows), ROWS_AT_ONCE):
        part = [_hashes(row) for row in rows[at : at + ROWS_AT_ONCE]]
        hashes = np.unique(np.concatenate([hashes, *part]))[:kept]
    return "".join(f"{value:016x}" for value in hashes.tolist())


def shared_fraction(kept: str, tokens: Sequence[int]) -> float | None:
    """Estimated share, 0 to 1, of the windows of ``tokens`` that also stand in the sketched text.

    None when too few windows fall where the sketch is complete.
    """
    known = np.array([int(kept[at : at + 16], 16) for at in range(0, len(kept), 16)], dtype=np.uint64)
    hashes = _hashes(np.asarray(tokens))
    if len(known) >= KEPT:  # else it holds every window there was
        hashes = hashes[hashes <= known[-1]]
    return float(np.isin(hashes, known).mean()) if len(hashes) and len(known) else None


def copied_fraction(rows: Sequence[np.ndarray], tokens: np.ndarray) -> float:
    """Share, 0 to 1, of the windows of ``tokens`` [n] that also stand in ``rows``, both texts being at hand.

    Windows of very many rows are boilerplate (a system prompt, a licence) and count as not shared.
    """
    wanted, counts = np.unique(_hashes(tokens), return_counts=True)
    found = np.zeros(len(wanted), dtype=np.int64)
    for row in rows:
        found += np.isin(wanted, _hashes(row))
    most = max(BOILERPLATE_ROWS, len(rows) * BOILERPLATE_SHARE)
    return float(counts[(found > 0) & (found < most)].sum() / counts.sum()) if len(wanted) else 0.0


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """One uint64 for each run of ``WINDOW`` tokens: a polynomial in the ids, mixed so that order says nothing."""
    count = max(0, len(tokens) - WINDOW + 1)
    ids = tokens.astype(np.uint64) + np.uint64(1)
    value = np.zeros(count, dtype=np.uint64)
    for offset in range(WINDOW):
        value = value * _BASE + ids[offset : offset + count]
    value = (value ^ (value >> np.uint64(30))) * _MIX
    return value ^ (value >> np.uint64(31))
