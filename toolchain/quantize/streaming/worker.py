"""What a worker on another machine does: open the source itself, and write whole shards to the shared storage.

Knows nothing of what started it. A worker that would write other bytes, or writes them somewhere else, refuses by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

import toolchain
from toolchain.checkpoint.shard_file import ShardFile
from toolchain.core.environment import package_versions, peak_memory_bytes
from toolchain.core.errors import ToolchainError
from toolchain.core.files import sha256_file
from toolchain.plan.types import Plan
from toolchain.quantize.streaming.datafree import Source, make_packer, named_dtype, open_stream, settings
from toolchain.quantize.streaming.executor import PackJob
from toolchain.quantize.streaming.journal import SETTINGS, Journal
from toolchain.quantize.streaming.outline import Item, Outline
from toolchain.quantize.streaming.pack import Packer
from toolchain.quantize.streaming.rows import TORCH_DTYPES
from toolchain.quantize.streaming.shards import fill_shard, one_thread_each

ATTEMPTS = "attempts"
"""Directory beside the journal's ``content``: a worker that was given up may still write, and must not write there."""
TELL_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What all tasks of one run have in common."""

    terms: str
    """JSON: what decides the bytes, and which code makes them, by name."""
    plan: str
    """JSON; the model is an absolute path."""
    dtype: str | None
    """Safetensors name of what the model computes in; None: as its files say."""
    journal: str
    """Absolute path of the journal's directory."""
    begun: str
    """SHA-256 of the settings in that directory."""
    attempts: str
    """Absolute path of this run's directory for shards that are being written."""
    outline: Outline = field(repr=False)
    """The driver's: looked at only where the code is the driver's."""
    device: str
    threads: int

    def __eq__(self, other: object) -> bool:
        """By run: every task gets a copy."""
        return isinstance(other, Work) and self.attempts == other.attempts

    def __hash__(self) -> int:
        return hash(self.attempts)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A shard that was written, under the name of its attempt."""

    attempt: str
    sha256: str
    bytes: int
    cast: dict[str, dict[str, int]]
    peak_memory_bytes: int


def make_work(source: Source, journal: Journal, attempts: Path, *, device: str, threads: int) -> Work:
    plan = replace(source.plan, model=str(source.directory.resolve()))
    names, dtype = {kind: name for name, kind in TORCH_DTYPES.items()}, named_dtype(source.directory)
    return Work(
        terms=json.dumps(_terms(replace(source, plan=plan)), sort_keys=True),
        plan=json.dumps(plan.to_json()),
        dtype=names[dtype] if dtype else None,
        journal=str(journal.root.resolve()),
        begun=sha256_file(journal.root / SETTINGS),
        attempts=str(attempts.resolve()),
        outline=source.outline,
        device=device,
        threads=threads,
    )


def write(work: Work, file: str) -> Made:
    """Write the shard ``file`` under a name that no other attempt has. ToolchainError TC-238 when this worker cannot
    take part."""
    packer, attempts = _open(work), Path(work.attempts)
    shard = next(shard for shard in packer.outline.shards if shard.file == file)
    for given_up in attempts.glob(f"{file}.*.partial"):  # its worker died, or nobody waits for it any more
        given_up.unlink(missing_ok=True)
    path = attempts / f"{file}.{uuid4().hex}.partial"
    with one_thread_each(), ThreadPoolExecutor(work.threads, thread_name_prefix="pack") as pool:
        written = fill_shard(packer, shard, path, pool, Told(attempts / told_name(file)))
        flushed = pool.submit(written.close)  # the disk writes while the hash is computed
        digest = sha256_file(path)
        flushed.result()
    items = {item.name for item in shard.items}
    _release(packer, shard.items)
    return Made(
        attempt=path.name,
        sha256=digest,
        bytes=path.stat().st_size,
        cast={name: counts for name, counts in packer.cast.items() if name in items},
        peak_memory_bytes=peak_memory_bytes(),
    )


def pack(work: Work, job: PackJob) -> str:
    """Pack ``job`` into a file of its own; returns its name among the attempts. Errors as ``write``."""
    packer, path = _open(work), Path(work.attempts) / f"{uuid4().hex}.piece"
    wanted = set(job.names)
    found = {
        item.name: item for shard in packer.outline.shards for item in shard.items if item.name in wanted
    }
    specs = [spec for item in found.values() for spec in item.outputs]
    file = ShardFile(path, specs)
    try:
        with one_thread_each(), ThreadPoolExecutor(work.threads, thread_name_prefix="pack") as pool:
            waiting = [
                pool.submit(packer.write, item, file, input_amax=job.input_amax.get(item.module))
                for item in found.values()
            ]
            for future in waiting:
                future.result()
        file.flush()
    finally:
        file.abandon()
    _release(packer, found.values())
    return path.name


def _release(packer: Packer, items: Iterable[Item]) -> None:
    """Tensors that were looked at for a scale that they share with ``items``: others pack them, and this process may
    live long."""
    names = {item.module: item.name for shard in packer.outline.shards for item in shard.items}
    for item in items:
        for member in packer.outline.groups.get(item.module, ()):
            for name in packer.rows.stored_names(names[member]):
                packer.rows.release(name)


def told_name(file: str) -> str:
    return f"{file}.bytes"


class Told:
    """How much of a shard is written, in a small file for the driver to read. Called from several threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._bytes, self._last, self._lock = path, 0, time.monotonic(), threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._bytes += count
            if time.monotonic() - self._last < TELL_EVERY_S:
                return
            self._last = time.monotonic()
            with contextlib.suppress(
                OSError
            ):  # the shard matters, not the bar; a full disk shows in the shard
                self._path.write_text(str(self._bytes), encoding="ascii")


@lru_cache(maxsize=1)
def _open(work: Work) -> Packer:
    """Once per process and run: headers are read and compared, weights are not."""
    _require_code(work)
    _require_files(work)
    plan = Plan.from_json(json.loads(work.plan))
    source = open_stream(plan, dtype=TORCH_DTYPES[work.dtype] if work.dtype else None)
    wanted, here = json.loads(work.terms), _terms(source)
    if wanted != here:
        raise _refused({name: (value, here.get(name)) for name, value in wanted.items()})
    return make_packer(replace(source, outline=work.outline), torch.device(work.device))


def _require_code(work: Work) -> None:
    """Before anything is read that another version would read otherwise."""
    wanted, here = json.loads(work.terms), _code()
    if any(wanted.get(name) != value for name, value in here.items()):
        raise _refused({name: (wanted.get(name), value) for name, value in here.items()})


def _require_files(work: Work) -> None:
    for path, what in ((json.loads(work.plan)["model"], "the model"), (work.attempts, "the output")):
        if not Path(path).is_dir():
            raise _apart(f"{what} ({path}) is not there")
    begun = Path(work.journal) / SETTINGS
    if not begun.is_file() or sha256_file(begun) != work.begun:
        raise _apart(f"{begun} is not what the run was begun with")


def _terms(source: Source) -> dict[str, Any]:
    return {**settings(source), **_code()}


def _code() -> dict[str, Any]:
    """Versions of all that decides bytes, and of this package's very code: a checkout has one version for ever."""
    root, versions = Path(toolchain.__file__).parent, package_versions()
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    names = ("toolchain", "torch", "nvidia-modelopt", "numpy", "safetensors")
    return {
        **{f"version of {name}": versions.get(name) for name in names},
        "code of toolchain": total.hexdigest()[:12],
    }


def _refused(found: dict[str, tuple[Any, Any]]) -> ToolchainError:
    """``found``: name -> (the driver's, this worker's), those that are equal among them."""
    changes = "; ".join(
        f"{name}: {ours!r} -> {mine!r}" for name, (ours, mine) in found.items() if ours != mine
    )
    return ToolchainError(
        f"the worker on {socket.gethostname()} would write other bytes than this run ({changes})",
        hint="give every node the same environment and the same files, then run the same command again",
        code="TC-238",
    )


def _apart(said: str) -> ToolchainError:
    return ToolchainError(
        f"the worker on {socket.gethostname()} does not see what this run works on: {said}",
        hint="put the model and the output on storage that every node has under the same path",
        code="TC-238",
    )
