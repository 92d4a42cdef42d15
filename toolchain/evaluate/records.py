"""What a measurement keeps: one number per token, a few per window. Never a distribution."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Batch = dict[str, np.ndarray]
"""``name/figure`` -> values of one batch. All batches have the same names; their values follow each other.

Per token [n]: ``baseline/nll`` and of each variant ``nll``, ``kl``, ``reverse_kl``, ``top1``, ``top5``
(``divergence.py``). Per window [B, ...]: ``scored`` and ``fresh`` (how many tokens and positions), and of each variant
``hidden`` and ``routing``; per batch [1, ...] ``load`` (``inside.py``).
"""


class Records:
    def __init__(self, batches: Iterable[Batch] = ()) -> None:
        self._batches = list(batches)
        self._joined: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch) -> None:
        self._batches.append(batch)
        self._joined = {}

    def __contains__(self, name: str) -> bool:
        return bool(self._batches) and name in self._batches[0]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._joined:
            self._joined[name] = np.concatenate([batch[name] for batch in self._batches])
        return self._joined[name]

    def per_window(self, name: str) -> np.ndarray:
        """[windows] float64: sums of a figure per token over the scored tokens of each window."""
        ends = np.cumsum(self["scored"])
        return np.add.reduceat(self[name].astype(np.float64), ends - self["scored"])
