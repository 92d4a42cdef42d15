"""Tile sizes: the ones of a multiplication, the default ones, and which a tuner tries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from toolchain.kernels.kinds import Kind

LONE_PAIRS = 32
"""Up to so many pairs of token and expert each pair is a block: sorting would cost more than reading weights again."""
SMALL = 16
"""Rows of a block up to which a multiplication is bound by the memory that its weights come from."""
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of tokens for which settings are chosen; one in between takes the next larger."""


TCGEN05_ROWS = 128
"""Rows of the left operand of Blackwell's product of scaled blocks; triton compiles no fewer."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one launch of ``packed_matmul``."""

    block_m: int
    """Rows of inputs."""
    block_n: int
    """Rows of weights."""
    block_k: int
    group_m: int = 8
    """Blocks of inputs that run side by side over the same weights."""
    split_k: int = 1
    """Programs that share one block's sum."""
    warps: int = 4
    stages: int = 3
    """Loads in flight."""
    by_torch: int = 0
    """1: torch's scaled grouped matmul instead of ours, with blocks of ours for the sorting alone."""

    def as_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def of_json(cls, stored: dict[str, Any]) -> Settings:
        return cls(**{name: int(value) for name, value in stored.items()})


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the best settings depend on."""

    kind: Kind
    n: int
    k: int
    experts: int
    """1 for a Linear of its own."""
    top_k: int
    gated: bool

    @property
    def key(self) -> str:
        """``nvfp4-e2m1/1536x2048/128e8/gated``, the name in an engine's table."""
        experts = f"/{self.experts}e{self.top_k}" if self.experts > 1 else ""
        return (
            f"{self.kind.format}-{self.kind.code}/{self.n}x{self.k}{experts}{'/gated' if self.gated else ''}"
        )


def bucket(tokens: int) -> int:
    """The number of tokens whose settings ``tokens`` take."""
    return next((size for size in BUCKETS if tokens <= size), BUCKETS[-1])


def rows_per_expert(shape: Shape, tokens: int) -> float:
    """Rows that an expert has on average, if any."""
    pairs = tokens * shape.top_k
    reached = shape.experts * (1 - (1 - 1 / shape.experts) ** pairs) if shape.experts > 1 else 1
    return pairs / max(reached, 1)


def default(shape: Shape, tokens: int, processors: int) -> Settings:
    """Without a tuner: small tiles that fill ``processors`` for few rows, large ones for many."""
    rows = rows_per_expert(shape, tokens)
    native = shape.kind.rounding == "nvfp4"
    if rows > SMALL * 2:
        # Sums under scales of their own are a second accumulator.
        block_m = 64 if rows <= 96 or shape.kind.multiplies_sums else 128
        block_k = 128 if shape.kind.bits == 8 or shape.kind.multiplies_sums or native else 64
        return Settings(block_m=block_m, block_n=128, block_k=block_k, warps=8, stages=3)
    block_m = SMALL if rows <= SMALL else 2 * SMALL
    block_n = TCGEN05_ROWS if native else 64
    block_k = 128
    blocks = -(-shape.n // block_n) * min(shape.experts, tokens * shape.top_k)
    split = 1
    while blocks * split < processors * 2 and shape.k // (split * 2) >= 4 * block_k and split < 8:
        split *= 2
    return Settings(block_m=block_m, block_n=block_n, block_k=block_k, split_k=split, warps=4, stages=4)


def candidates(shape: Shape, tokens: int, processors: int) -> Iterator[Settings]:
    """What a tuner tries, the default first."""
    first = default(shape, tokens, processors)
    yield first
    rows = rows_per_expert(shape, tokens)
    is_sorted = shape.experts > 1 and tokens * shape.top_k > LONE_PAIRS
    if is_sorted and shape.kind.rounding in ("tensor", "token"):
        yield replace(first, by_torch=1)
    seen = {first}
    widest_k = 128 if shape.kind.multiplies_sums else 256
    if rows <= SMALL * 2:
        tiles = [(first.block_m, n, k) for n in (32, 64, 128) for k in (64, 128, 256) if k <= widest_k]
        splits: tuple[int, ...] = (1, 2, 4)
        pipelines: tuple[tuple[int, int], ...] = ((4, 3), (4, 5), (8, 3), (2, 5))
    else:
        sizes = (32, 64, 128) if rows <= 256 else (64, 128)
        tiles = [(m, n, k) for m in sizes for n in (64, 128, 256) for k in (64, 128) if m * n <= 128 * 128]
        splits, pipelines = (1,), ((4, 3), (8, 3), (8, 4))
    if shape.kind.rounding == "nvfp4":
        tiles = [(m, max(n, TCGEN05_ROWS), max(k, 128)) for m, n, k in tiles]
    for m, n, k in tiles:
        for split in splits:
            if split > 1 and shape.k // split < 2 * k:
                continue
            for warps, stages in pipelines:
                if m * n > 64 * 128 and warps < 8:
                    continue
                made = Settings(block_m=m, block_n=n, block_k=k, split_k=split, warps=warps, stages=stages)
                if made not in seen:
                    seen.add(made)
                    yield made
