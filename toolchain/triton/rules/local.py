"""The ``local`` layout: served.json of each version, its engine and its interpreter."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolchain.core.findings import Finding
from toolchain.runtime.ways import KERNELS, KV_CACHES, KV_LAYOUTS
from toolchain.triton.rules.model import Model, read_bytes
from toolchain.triton.rules.rule import Rule
from toolchain.triton.served import SERVED

MAX_BYTES = 2**20
AGAIN = "render the repository again"
TEMPLATES = Path(__file__).parent.parent / "templates"
IMPORT = re.compile(rb"^(?:from|import) (\w+)", re.MULTILINE)
PATHS = ("engine_dir", "python")
NUMBERS = {
    "ready_timeout_s": (int, 1),
    "cancellation_check_period_ms": (int, 1),
    "warmup_requests": (int, 0),
    "max_waiting": (int, 0),
    "max_waiting_tokens": (int, 0),
    "max_queue_s": (float, 0),
}
"""Key -> (type, smallest value)."""
WORDS = {"kernels": KERNELS, "kv_cache": KV_CACHES, "kv_layout": KV_LAYOUTS}
POLICY = Rule(
    code="TC-602",
    says="a model of the local layout that is not decoupled, or batches in Triton",
    server="loads it; answers in pieces fail",
    hint="expected max_batch_size 0 and decoupled true: the engine process batches by itself and answers in pieces",
)
BESIDE = Rule(
    code="TC-604",
    says="served.json of the local layout is missing, or a file that its model.py imports",
    server="refuses",
    hint=AGAIN,
)
SERVED_KEYS = Rule(
    code="TC-602",
    says="served.json is no JSON object, lacks engine_dir or python, or has a value of the wrong kind",
    server="model.py fails with it",
    hint=AGAIN,
)
SERVED_UNKNOWN = Rule(
    code="TC-602",
    severity="warning",
    says="a key in served.json that nothing reads",
    server="model.py ignores it",
    hint="remove it",
)
GONE = Rule(
    code="TC-610",
    says="the engine or the interpreter that served.json names is not on this machine",
    server="model.py fails",
    hint=AGAIN,
)
RULES = (POLICY, BESIDE, SERVED_KEYS, SERVED_UNKNOWN, GONE)


def lint_local(model: Model, versions: list[Path], *, check_paths: bool) -> Iterator[Finding]:
    """``versions``: all directories, also of versions that only a rolling update will load."""
    config = model.config
    if config.max_batch_size != 0 or not config.model_transaction_policy.decoupled:
        field = "max_batch_size" if config.max_batch_size else "model_transaction_policy"
        message = (
            f"max_batch_size {config.max_batch_size}, decoupled {config.model_transaction_policy.decoupled}"
        )
        yield POLICY.found(model.where(field), message)
    for version in versions:
        yield from _version(version, model.beside(version.name), check_paths=check_paths)


def _version(version: Path, where: str, *, check_paths: bool) -> Iterator[Finding]:
    for name in sorted({SERVED, *_modules(version)}):
        if not (version / name).is_file():
            yield BESIDE.found(f"{where}/{name}", "missing")
    where = f"{where}/{SERVED}"
    if not (version / SERVED).is_file():
        return
    raw, problem = read_bytes(version / SERVED, where, limit=MAX_BYTES)
    if problem is not None:
        yield problem
        return
    try:
        served = json.loads(raw)
    except (ValueError, RecursionError) as error:
        place = f":{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        yield SERVED_KEYS.found(where + place, f"no JSON: {getattr(error, 'msg', error)}")
        return
    if not isinstance(served, dict):
        yield SERVED_KEYS.found(where, f"holds a {type(served).__name__}, expected an object")
        return
    yield from _values(served, where)
    if check_paths:
        yield from _paths(served, where)


def _modules(version: Path) -> set[str]:
    """The files of the template that the ones in ``version`` import."""
    ours = {path.name for folder in ("shared", "local") for path in (TEMPLATES / folder).glob("*.py")}
    there = [read_bytes(path, path.name, limit=MAX_BYTES)[0] for path in version.glob("*.py")]
    return ours & {f"{name.decode()}.py" for text in there for name in IMPORT.findall(text)}


def _values(served: dict[str, Any], where: str) -> Iterator[Finding]:
    for key in PATHS:
        if not isinstance(served.get(key), str) or not served[key]:
            yield SERVED_KEYS.found(where, f"{key} is {served.get(key)!r}, expected a path")
    for key, (kind, least) in NUMBERS.items():
        value = served.get(key)
        if value is None:
            continue
        fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
        if not fits or value < least:
            noun = "a number" if kind is float else "an integer"
            yield SERVED_KEYS.found(where, f"{key} is {value!r}, expected {noun} >= {least}")
    for key, words in WORDS.items():
        if served.get(key) is not None and served[key] not in words:
            yield SERVED_KEYS.found(where, f"{key} is {served[key]!r}, expected one of {', '.join(words)}")
    known = (*PATHS, *NUMBERS, *WORDS)
    for key in sorted(set(served) - set(known)):
        near = difflib.get_close_matches(key, known, n=1)
        yield SERVED_UNKNOWN.found(where, f"unknown key {key!r}", f"nearest: {near[0]}" if near else "")


def _paths(served: dict[str, Any], where: str) -> Iterator[Finding]:
    engine, python = (Path(item) if isinstance(item := served.get(key), str) else Path() for key in PATHS)
    if engine != Path() and not (engine / "engine.json").is_file():
        yield GONE.found(where, f"engine_dir {engine} holds no engine.json")
    if python != Path() and not (os.access(python, os.X_OK) and python.is_file()):
        yield GONE.found(where, f"python {python} is not an executable file")
