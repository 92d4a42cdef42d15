"""A release line of TensorRT-LLM (1.2: 1.2.0, 1.2.1 and their candidates): what it adds to the one before."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.targets.known_bad import KnownBad
from toolchain.targets.rows import Row
from toolchain.targets.version import parse_version


@dataclass(frozen=True, kw_only=True)
class Line:
    name: str
    """``MAJOR.MINOR``."""
    versions: tuple[str, ...]
    """Releases that the table was made for, oldest first."""
    before: Line | None = None
    """The line that this one builds on: its rows hold too, after the own ones."""
    rows: tuple[Row, ...] = ()
    """Formats; the newest first, because the first row that covers a request decides (for each MoE backend)."""
    kv_rows: tuple[Row, ...] = ()
    head_rows: tuple[Row, ...] = ()
    """A quantized lm_head."""
    known_bad: tuple[KnownBad, ...] = ()
    backends: tuple[str, ...]
    """Values of ``moe_config.backend`` that the line knows, without AUTO."""
    backends_source: str
    eplb: tuple[str, ...]
    """Backends with expert load balancing."""
    eplb_source: str

    @property
    def key(self) -> tuple[int, int]:
        major, minor = self.name.split(".")
        return int(major), int(minor)

    def all_rows(self) -> tuple[Row, ...]:
        """Own rows and those of the lines before, without backends that are gone."""
        inherited = self.before.all_rows() if self.before else ()
        return tuple(
            row for row in (*self.rows, *inherited) if not row.backend or row.backend in self.backends
        )

    def all_kv_rows(self) -> tuple[Row, ...]:
        return (*self.kv_rows, *(self.before.all_kv_rows() if self.before else ()))

    def all_head_rows(self) -> tuple[Row, ...]:
        return (*self.head_rows, *(self.before.all_head_rows() if self.before else ()))

    def all_known_bad(self) -> tuple[KnownBad, ...]:
        return (*self.known_bad, *(self.before.all_known_bad() if self.before else ()))


def line_of(lines: tuple[Line, ...], version: str) -> Line:
    """The line of a release; the newest for what is newer than all, the oldest for what is older."""
    key = parse_version(version).key[:2]
    return next((line for line in reversed(lines) if line.key <= key), lines[0])
