"""What commands print: JSON or tables on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar

import click

T = TypeVar("T")
GIB = 1024**3


@contextlib.contextmanager
def stdout_for_data() -> Iterator[IO[str]]:
    """A stream to the real stdout. Meanwhile whatever libraries print, from C as well, goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace") as data:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield data
            data.flush()
        except BrokenPipeError:
            _discard(data)
        finally:
            sys.stdout.flush()
            os.dup2(data.fileno(), 1)


def _discard(stream: IO[str]) -> None:
    """The reader (head, less) has seen enough: what is left goes nowhere, and closing raises no second error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def write_data(text: str, *, end: str = "\n") -> None:
    """Print to the stream that ``main`` keeps for data, to plain stdout outside of it. Ends the command without an
    error when nobody reads any more."""
    context = click.get_current_context(silent=True)
    stream = (context.obj or {}).get("stdout") if context else None
    try:
        click.echo(text + end, file=stream, nl=False)
    except BrokenPipeError:
        _discard(stream or sys.stdout)
        raise click.exceptions.Exit(0) from None


def emit(value: Any, as_json: bool, text: str) -> None:
    """Print ``value`` as JSON, or ``text`` for people."""
    write_data(json.dumps(value, indent=2, default=str) if as_json else text)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain table; the last column may be long. Plain text survives logs, pipes and narrow terminals."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in [list(headers), *cells]) for index in range(len(headers))]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Aligned ``name  value`` lines."""
    items = [(name, str(value)) for name, value in pairs]
    width = max(len(name) for name, _ in items)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in items)


def size(count: float) -> str:
    """Bytes in a unit that reads well."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


class Terminal:
    """Progress on stderr: a bar on a terminal, a line every few seconds in a log."""

    LOG_EVERY_S = 15.0

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def track(self, items: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
        if sys.stderr.isatty():
            yield from self._bar(items, description, total)
        else:
            yield from self._log(items, description, total)

    def _bar(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Eta

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Eta(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=total, description=description)

    def _log(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        started = last = time.monotonic()
        for count, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - last >= self.LOG_EVERY_S:
                last = now
                left = f", about {(now - started) / count * (total - count):.0f} s left" if total else ""
                self.note(f"{description}: {count}{f' of {total}' if total else ''}{left}")

    @contextlib.contextmanager
    def meter(self, *, description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        if sys.stderr.isatty():
            with _byte_bar() as bar:
                task = bar.add_task(description, total=total_bytes, memory="")
                yield lambda count: bar.update(task, advance=count, memory=_memory())
            return
        yield _LoggedMeter(self, description, total_bytes)


class _LoggedMeter:
    """A line every few seconds."""

    def __init__(self, terminal: Terminal, description: str, total: int) -> None:
        self._terminal, self._description, self._total = terminal, description, total
        self._done, self._started, self._lock = 0, time.monotonic(), threading.Lock()
        self._last = self._started

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._last < Terminal.LOG_EVERY_S or not self._done:
                return
            self._last = now
        rate = self._done / (now - self._started)
        self._terminal.note(
            f"{self._description}: {size(self._done)} of {size(self._total)}, {size(int(rate))}/s, "
            f"about {(self._total - self._done) / rate:.0f} s left, {_memory()}"
        )


def _byte_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.progress import TimeRemainingColumn as Eta

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        Eta(),
        TextColumn("{task.fields[memory]}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _memory() -> str:
    from toolchain.core.environment import memory_bytes

    return f"memory {size(memory_bytes())}"
