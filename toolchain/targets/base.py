"""A Target runs engines.

What it supports is a table of rows; looking things up is the same for every target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toolchain.targets.version import parse_version

Model = Literal["dense", "moe"]
State = Literal["yes", "limited", "no"]
PartKind = Literal["dense", "moe", "lm_head"]
"""What a quantized matrix is to a runtime: a Linear, an expert in a fused kernel, or the output head."""

ANY_SM = tuple(range(1000))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a support table: what is not in any row is not supported."""

    formats: tuple[str, ...]
    sms: tuple[int, ...]
    """CUDA SM versions."""
    models: tuple[Model, ...] = ("dense", "moe")
    since: str = ""
    """First release; empty: every release of the table."""
    until: str = ""
    """First release without it; empty: still there."""
    state: State = "yes"
    """``limited``: it runs, and ``note`` says what is different."""
    backend: str = ""
    """``moe_config.backend`` that a mixture-of-experts model needs."""
    note: str = ""
    source: str = ""

    def covers(self, *, format_name: str, sm: int, model: Model, version: str) -> bool:
        if format_name not in self.formats or sm not in self.sms or model not in self.models:
            return False
        wanted = parse_version(version)
        return (not self.since or wanted >= parse_version(self.since)) and (
            not self.until or wanted < parse_version(self.until)
        )


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Which mixtures of experts a target loads when their parts have several formats (MIXED_PRECISION)."""

    families: tuple[str, ...]
    """Families whose loader asks for the format of the experts layer by layer."""
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
    rows: tuple[Row, ...]
    kv_rows: tuple[Row, ...] = ()
    """The same for KV cache formats."""
    head_rows: tuple[Row, ...] = ()
    """The same for a quantized lm_head."""
    mixed: Mixed | None = None
    """Limits of checkpoints in several formats; None for none."""
    needs_gpu: bool = True
    parallel: bool = True
    """Whether tp, ep and pp above 1 are possible."""
    emulates: bool = False
    """Weights are decoded to the source dtype in memory, and the KV cache keeps the model's dtype."""
    deprecated: str = ""
    """Why this target should not be chosen any more, and what to choose."""
    refuses: str = ""
    """Why nothing can be built for it; empty when it can."""

    def find(self, *, format_name: str, sm: int, model: Model, version: str) -> Row | None:
        """The first row that covers the request, or None when it is not supported."""
        return _first(self.rows, format_name, sm, model, version)

    def find_head(self, *, format_name: str, sm: int, version: str) -> Row | None:
        return _first(self.head_rows, format_name, sm, "dense", version)

    def mixes(self, family: str, *, is_moe: bool, version: str) -> State:
        """Whether a checkpoint in several formats loads; ``limited``: nobody knows for this family and release."""
        if self.mixed is None or not is_moe or family in self.mixed.families:
            return "yes"
        return "no" if parse_version(version) <= parse_version(self.mixed.broken_until) else "limited"

    def find_kv(self, *, kv_cache: str, sm: int, model: Model, version: str) -> Row | None:
        return _first(self.kv_rows, kv_cache, sm, model, version)


def _first(rows: tuple[Row, ...], format_name: str, sm: int, model: Model, version: str) -> Row | None:
    found = (row for row in rows if row.covers(format_name=format_name, sm=sm, model=model, version=version))
    row = next(found, None)
    return None if row is None or row.state == "no" else row
