"""Atomic writes, hashes and disk space. A file or directory is either complete under its name, or absent."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError

GIB = 1024**3


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, flush it to disk, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def atomic_write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline, written atomically. Key order is kept: it carries meaning to readers."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; a syntax error names the file, line and column."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ToolchainError(
            f"{path} is not valid JSON: line {error.lineno} column {error.colno}: {error.msg}",
            hint="the file is damaged or was cut off: fetch or write it again",
            code="TC-003",
        ) from error
    except UnicodeDecodeError as error:
        raise ToolchainError(
            f"{path} is not UTF-8 text", hint="fetch or write it again", code="TC-003"
        ) from error


@contextlib.contextmanager
def atomic_directory(
    path: Path, *, force: bool = False, on_replace: Callable[[], None] | None = None
) -> Iterator[Path]:
    """Yield a hidden sibling directory; rename it to ``path`` on success, remove it on failure.

    Raises UsageError if ``path`` exists and is not empty, unless ``force``: then the old content is replaced in the
    last step, so that a failure loses nothing; ``on_replace`` is called just before it. ToolchainError TC-008 when
    another process writes the same directory.
    """
    refuse_occupied(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(path) as partial:
        try:
            yield partial
            if on_replace is not None:
                on_replace()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(path)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """The empty hidden sibling of ``path``, locked while it is written."""
    partial = _partial(path)
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        lock(handle, path)
        for left in partial.iterdir():  # by a run that was killed
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        yield partial
    finally:
        os.close(handle)


def lock(handle: int, path: Path) -> None:
    """Lock the open file or directory ``handle`` for ``path``. The lock goes with the process, however that ends.

    ToolchainError TC-008 when another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ToolchainError(
            f"{path} is being written by another run",
            hint="wait for it, or use another --output",
            code="TC-008",
        ) from error
    except OSError:
        return  # some network file systems have no locks: there it goes on without


def refuse_occupied(path: Path, *, force: bool = False) -> None:
    """UsageError unless ``path`` is absent, an empty directory, or ``force`` is given."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"output {path} is a file, expected a directory", code="TC-004")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UsageError(
            f"output directory {path} is not empty ({sum(1 for _ in path.iterdir())} entries)",
            hint="choose another --output, or pass --force to replace it",
            code="TC-004",
        )


def refuse_file(path: Path, *, force: bool = False) -> None:
    """UsageError when the output file ``path`` exists, unless ``force``; always when it is a directory."""
    if path.is_dir():
        raise UsageError(f"output {path} is a directory, expected a file", code="TC-004")
    if path.exists() and not force:
        raise UsageError(
            f"output {path} exists", hint="choose another --output, or pass --force", code="TC-004"
        )


def refuse_to_replace_source(output: Path, source: Path) -> None:
    """UsageError when ``output`` is ``source`` or holds it: replacing it would remove what is read."""
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(
            f"output {output} is, or holds, the source {source}",
            hint="choose another --output",
            code="TC-004",
        )


def require_free_bytes(path: Path, needed_bytes: int, *, what: str) -> None:
    """ToolchainError when the file system that will hold ``path`` has less than ``needed_bytes`` free."""
    probe = path
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed_bytes:
        raise ToolchainError(
            f"{what} needs {needed_bytes / GIB:.3g} GiB but {probe} has {free / GIB:.3g} GiB free",
            hint="free some space or choose an --output on a larger disk",
            code="TC-005",
        )


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_tree(root: Path, *, skip: Container[str] = ()) -> dict[str, str]:
    """Relative path -> SHA-256 of every regular file below ``root``, hidden ones excluded, sorted by path.

    ``skip``: relative paths whose hash is known already.
    """
    files = sorted(path for path in root.rglob("*") if path.is_file())
    relative = [path.relative_to(root) for path in files]
    return {
        str(name): sha256_file(root / name)
        for name in relative
        if str(name) not in skip and not any(p.startswith(".") for p in name.parts)
    }
