"""A Target runs engines.

What it supports is a table of rows, one for each release line where lines differ; looking things up is the same for
every target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toolchain.targets.known_bad import KnownBad
from toolchain.targets.line import Line, line_of
from toolchain.targets.rows import Model, Row, State, best, first
from toolchain.targets.version import parse_version

PartKind = Literal["dense", "moe", "lm_head"]
"""What a quantized matrix is to a runtime: a Linear, an expert in a fused kernel, or the output head."""

ANY_SM = tuple(range(1000))


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Which mixtures of experts a target loads when their parts have several formats (MIXED_PRECISION)."""

    families: tuple[str, ...]
    """Families whose loader asks for the format of the experts layer by layer."""
    since: str
    """First release known to load them with shared and routed experts in two formats."""
    broken_until: str
    """Releases up to this one are known to fail for the other families; later ones are not known to work."""
    reason: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Target:
    name: str
    title: str
    default_version: str
    versions: tuple[str, ...]
    """Releases that the tables were made for, oldest first."""
    rows: tuple[Row, ...] = ()
    """For targets without ``lines``."""
    kv_rows: tuple[Row, ...] = ()
    """The same for KV cache formats."""
    head_rows: tuple[Row, ...] = ()
    """The same for a quantized lm_head."""
    lines: tuple[Line, ...] = ()
    """Tables by release line, oldest first, in place of ``rows``, ``kv_rows`` and ``head_rows``."""
    mixed: Mixed | None = None
    """Limits of checkpoints in several formats; None for none."""
    needs_gpu: bool = True
    parallel: bool = True
    """Whether tp, ep and pp above 1 are possible."""
    emulates: bool = False
    """Weights are decoded to the source dtype in memory, and the KV cache keeps the model's dtype, except where
    ``packed`` says otherwise; MLA's keys and values are kept for each head."""
    packed: tuple[str, ...] = ()
    """Formats whose weights stay packed all the same, on GPUs since SM ``packed_since``."""
    packed_kv: tuple[str, ...] = ()
    """The same for KV caches."""
    packed_since: int = 0
    deprecated: str = ""
    """Why this target should not be chosen any more, and what to choose."""
    refuses: str = ""
    """Why nothing can be built for it; empty when it can."""
    sparse_rows: tuple[Row, ...] = ()
    """What gains from 2:4 sparsity, by format, SM and kind of part; the first row that covers a request decides."""
    dense_because: str = ""
    """Why nothing gains, for targets without ``sparse_rows``."""

    def keeps(self, format_name: str, sm: int) -> bool:
        """Whether a GPU holds weights of this format as they are stored."""
        return not self.emulates or (sm >= self.packed_since > 0 and format_name in self.packed)

    def keeps_kv(self, kv_cache: str, sm: int) -> bool:
        """The same of a KV cache."""
        return not self.emulates or (sm >= self.packed_since > 0 and kv_cache in self.packed_kv)

    def line(self, version: str) -> Line | None:
        """The table of a release; None for targets without lines."""
        return line_of(self.lines, version) if self.lines else None

    def rows_for(self, *, format_name: str, sm: int, model: Model, version: str) -> list[Row]:
        """Every row about the request, the newest first; several where MoE backends differ."""
        line = self.line(version)
        return _covering(line.all_rows() if line else self.rows, format_name, sm, model, version)

    def find(self, *, format_name: str, sm: int, model: Model, version: str) -> Row | None:
        """The row to run by, or None when it is not supported.

        For experts the one of the MoE backend that is chosen when nobody asks for another.
        """
        rows = self.rows_for(format_name=format_name, sm=sm, model=model, version=version)
        return best(rows) if model == "moe" else first(rows)

    def find_head(self, *, format_name: str, sm: int, version: str) -> Row | None:
        line = self.line(version)
        return first(
            _covering(line.all_head_rows() if line else self.head_rows, format_name, sm, "dense", version)
        )

    def mixes(self, family: str, *, is_moe: bool, version: str) -> State:
        """Whether a checkpoint in several formats loads; ``limited``: nobody knows for this family and release."""
        if self.mixed is None or not is_moe:
            return "yes"
        if family in self.mixed.families:
            return "yes" if parse_version(version) >= parse_version(self.mixed.since) else "limited"
        return "no" if parse_version(version) <= parse_version(self.mixed.broken_until) else "limited"

    def find_kv(self, *, kv_cache: str, sm: int, model: Model, version: str) -> Row | None:
        line = self.line(version)
        return first(_covering(line.all_kv_rows() if line else self.kv_rows, kv_cache, sm, model, version))

    def known_bad(self, version: str) -> tuple[KnownBad, ...]:
        """Combinations with reports against this release or its neighbours."""
        line = self.line(version)
        return line.all_known_bad() if line else ()


def _covering(rows: tuple[Row, ...], format_name: str, sm: int, model: Model, version: str) -> list[Row]:
    return [row for row in rows if row.covers(format_name=format_name, sm=sm, model=model, version=version)]


__all__ = ["ANY_SM", "Mixed", "Model", "PartKind", "Row", "State", "Target"]
