"""Which settings a multiplication runs with: those that the engine's table holds, else the default ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from toolchain.kernels.settings import Settings, Shape, bucket, default

CPU_PROCESSORS = 4


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass
class Chooser:
    """Shared by all packed modules of a model."""

    processors: int
    table: Mapping[str, Mapping[int, Settings]] = field(default_factory=dict)
    """``Shape.key`` -> number of tokens (``BUCKETS``) -> Settings."""
    _made: dict[tuple[Shape, int], Settings] = field(default_factory=dict)

    def settings(self, shape: Shape, tokens: int) -> Settings:
        size = bucket(tokens)
        found = self._made.get((shape, size))
        if found is None:
            found = self.table.get(shape.key, {}).get(size) or default(shape, size, self.processors)
            self._made[shape, size] = found
        return found

    def pair(self, first: Shape, second: Shape, tokens: int) -> tuple[Settings, Settings]:
        """Of two multiplications over one sorting, whose blocks therefore have as many rows."""
        chosen = self.settings(first, tokens), self.settings(second, tokens)
        if chosen[0].block_m == chosen[1].block_m:
            return chosen
        # A table that does not know both. The default ones have as many rows, a mixture was never tried.
        size = bucket(tokens)
        return default(first, size, self.processors), default(second, size, self.processors)

    def use(self, table: Mapping[str, Mapping[int, Settings]]) -> None:
        """From now on."""
        self.table = table
        self._made.clear()
