"""Results in files: written in the newest schema, read in every one that there was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from toolchain.bench.settings import Settings
from toolchain.bench.types import (
    SCHEMA_VERSION,
    BenchResult,
    Distribution,
    Generator,
    Goodput,
    GpuUse,
    Interval,
    Level,
    Repeat,
)
from toolchain.core.errors import UsageError
from toolchain.core.files import atomic_write_json, read_json

CODE = "TC-706"
DISTRIBUTIONS = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "user_tokens_per_s")


def write_result(path: Path, result: BenchResult) -> None:
    """Write the JSON document atomically."""
    atomic_write_json(path, result.to_json())


def read_result(path: Path) -> BenchResult:
    """The result in ``path``, of schema version 1 or 2.

    UsageError TC-706 when it is of another version, or no result; keys that this version does not know are passed
    over.
    """
    value = read_json(path)
    version = value.get("schema_version") if isinstance(value, dict) else None
    if not isinstance(value, dict) or "levels" not in value or "settings" not in value:
        raise UsageError(
            f"{path} is no result of toolchain bench", hint="give one of ENGINE/bench", code=CODE
        )
    if version not in (1, SCHEMA_VERSION):
        raise UsageError(
            f"{path} has schema version {version!r}, expected 1 or {SCHEMA_VERSION}",
            hint="read it with the version of the toolchain that wrote it, or measure again",
            code=CODE,
        )
    try:
        return _result(_upgraded(value) if version == 1 else value)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise UsageError(
            f"{path} is no complete result: {type(error).__name__} {error}",
            hint="measure again, or restore the file",
            code=CODE,
        ) from error


def _upgraded(value: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had one repeat, no steady state, and no ceiling."""
    settings = {**value["settings"], "repeats": 1, "ceiling": False}
    server = value.get("environment", {}).get("server") or {}
    imported = server.get("name") == "trtllm-bench"
    tool = "trtllm-bench" if imported else "toolchain"
    found = {
        "target": "trtllm-bench" if imported else "triton-grpc",
        "tool": tool,
        "schema_version": SCHEMA_VERSION,
    }
    return {"url": "", "model": "", **value, "settings": settings, **found}


def _result(value: dict[str, Any]) -> BenchResult:
    settings = _known(Settings, value["settings"])
    for name in ("concurrency", "rate"):
        settings[name] = tuple(settings.get(name, ()))
    levels = tuple(_level(level) for level in value["levels"])
    known = _known(BenchResult, value)
    return BenchResult(
        **{**known, "settings": Settings(**settings), "levels": levels, "schema_version": SCHEMA_VERSION}
    )


def _level(value: dict[str, Any]) -> Level:
    repeats = tuple(Repeat(**_summary(Repeat, repeat)) for repeat in value.get("repeats", ()))
    intervals = {
        name: Interval(**_known(Interval, item)) for name, item in value.get("intervals", {}).items()
    }
    generator = _optional(Generator, value.get("generator"))
    return Level(
        **{**_summary(Level, value), "repeats": repeats, "intervals": intervals, "generator": generator}
    )


def _summary(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    absent = {
        "error_messages": {},
        "warmup_errors": 0,
        "duration_s": 0.0,
        "prompt_tokens": 0,
        "output_tokens": 0,
    }
    optional = dict.fromkeys(("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"))
    found = _known(kind, {**absent, **optional, **value})
    for name in DISTRIBUTIONS:
        found[name] = _optional(Distribution, value.get(name))
    found["goodput"] = _optional(Goodput, value.get("goodput"))
    found["gpu"] = _optional(GpuUse, value.get("gpu"))
    return found


def _optional(kind: Callable[..., Any], value: dict[str, Any] | None) -> Any:
    if value is None:
        return None
    known = _known(kind, value)
    return kind(**{name: tuple(item) if isinstance(item, list) else item for name, item in known.items()})


def _known(kind: Any, value: dict[str, Any]) -> dict[str, Any]:
    """What ``kind`` has a field for. KeyError for a field without a default that is not there."""
    for field in fields(kind):
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed and field.name not in value:
            raise KeyError(field.name)
    names = {field.name for field in fields(kind)}
    return {name: item for name, item in value.items() if name in names}
