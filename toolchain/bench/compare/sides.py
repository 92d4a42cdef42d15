"""What is compared: one side is one result file or several, each with one repeat or more of each level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from toolchain.bench.intervals import figures_of
from toolchain.bench.results import read_result
from toolchain.bench.types import BenchResult, Distribution, Level
from toolchain.core.errors import UsageError

CODE = "TC-714"
Load = tuple[str, float]
"""("users", concurrency) or ("rate", requests per second)."""


@dataclass(frozen=True)
class Side:
    """Results that were measured alike."""

    label: str
    results: tuple[BenchResult, ...]

    @property
    def first(self) -> BenchResult:
        return self.results[0]

    @cached_property
    def levels(self) -> dict[Load, list[Level]]:
        """Load -> its level in each of the results."""
        found: dict[Load, list[Level]] = {}
        for result in self.results:
            for level in result.levels:
                found.setdefault(load_of(level), []).append(level)
        return found

    def values(self, load: Load, figure: str) -> list[float]:
        """One for each repeat that has the figure; a level without repeats counts as one."""
        runs = [run for level in self.levels[load] for run in (level.repeats or (level,))]
        found = [figures_of(run).get(figure) for run in runs]
        return [value for value in found if value is not None]

    def single(self, load: Load, name: str) -> Distribution | None:
        """The distribution over requests, where the load was run only once."""
        runs = [run for level in self.levels[load] for run in (level.repeats or (level,))]
        found: Distribution | None = getattr(runs[0], name, None) if len(runs) == 1 else None
        return found


def load_of(level: Level) -> Load:
    if level.concurrency is not None:
        return ("users", float(level.concurrency))
    return ("rate", float(level.rate or 0.0))


def load_words(load: Load) -> str:
    """``1 user``, ``4 users``, ``2.5 requests/s``."""
    kind, size = load
    return f"{size:g} user{'' if size == 1 else 's'}" if kind == "users" else f"{size:g} requests/s"


def read_side(names: str) -> Side:
    """``names``: a result file, a directory of results, an engine (its newest result), or several with commas.

    UsageError TC-714 for what holds none, TC-706 for a file that is no result.
    """
    files = [path for name in names.split(",") for path in result_files(Path(name))]
    results = tuple(read_result(path) for path in files)
    if not any(result.levels for result in results):
        raise UsageError(f"{names} has no level that was measured", hint="measure again", code=CODE)
    return Side(label=names, results=results)


def result_files(path: Path) -> Sequence[Path]:
    if path.is_file():
        return [path]
    if (path / "bench").is_dir():  # an engine
        found = sorted((path / "bench").glob("*.json"))[-1:]
    else:
        found = sorted(path.glob("*.json")) if path.is_dir() else []
    if not found:
        raise UsageError(
            f"{path} is no result of toolchain bench, nor a directory that holds one",
            hint="`toolchain bench ENGINE` writes one to ENGINE/bench; `--output FILE` to a place of your own",
            code=CODE,
        )
    return found
