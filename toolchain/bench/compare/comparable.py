"""What must be equal so that two results compare, and what is worth knowing when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from toolchain.bench.compare.sides import Side, load_words
from toolchain.bench.types import BenchResult
from toolchain.core.findings import Finding

CODE = "TC-715"
LENGTHS = ("prompt_tokens", "output_tokens", "trace", "ignore_eos")
OPEN_LOOP = ("arrival", "max_outstanding", "trace_speed")
MACHINE = ("cpu", "cpu_cores", "gpus")


def differences(a: Side, b: Side) -> list[Finding]:
    """Errors forbid a comparison, warnings go with it. Differences within a side are errors too."""
    found = [
        Finding(
            code=CODE,
            where=side.label,
            message=f"{name} is {_text(one)} in one file, {_text(other)} in another",
        )
        for side in (a, b)
        for result in side.results[1:]
        for name, one, other in _unlike(side.first, result)
    ]
    found += [
        Finding(code=CODE, where=name, message=f"{_text(one)} in A, {_text(other)} in B")
        for name, one, other in _unlike(a.first, b.first)
    ]
    return [*found, *_loads(a, b), *_failures(a, b), *_worth_knowing(a, b)]


def _unlike(one: BenchResult, other: BenchResult) -> Iterator[tuple[str, Any, Any]]:
    """(what, value, other value) of each condition that is not the same. What neither names is not compared."""
    pairs: dict[str, tuple[Any, Any]] = {
        "target": (one.target, other.target),
        "tool": (one.tool, other.tool),
        "model": (_engine(one, "model"), _engine(other, "model")),
        **{name: (getattr(one.settings, name), getattr(other.settings, name)) for name in LENGTHS},
        **{name: (one.environment.get(name), other.environment.get(name)) for name in MACHINE},
    }
    if one.settings.rate and other.settings.rate:
        pairs |= {name: (getattr(one.settings, name), getattr(other.settings, name)) for name in OPEN_LOOP}
    if one.target == other.target == "openai":
        pairs["endpoint"] = (one.settings.endpoint, other.settings.endpoint)
    if pairs["model"][0] is None or pairs["model"][1] is None:
        pairs["model"] = (one.model, other.model)
    for name, (value, another) in pairs.items():
        if value != another:
            yield name, value, another


def _engine(result: BenchResult, key: str) -> Any:
    engine = result.environment.get("engine")
    return engine.get(key) if isinstance(engine, dict) else None


def _loads(a: Side, b: Side) -> Iterator[Finding]:
    alone = [
        f"{load_words(load)} only in {name}"
        for name, side, other in (("A", a, b), ("B", b, a))
        for load in side.levels
        if load not in other.levels
    ]
    if alone:
        hint = "with --force the loads that both have are compared"
        yield Finding(code=CODE, where="load", message=", ".join(alone), hint=hint)


def _failures(a: Side, b: Side) -> Iterator[Finding]:
    for name, side in (("A", a), ("B", b)):
        failed = sum(result.errors for result in side.results)
        if failed:
            message = f"{failed} requests failed; the figures are of the others alone"
            yield Finding(code=CODE, where=name, message=message, hint="find out why before comparing")


def _worth_knowing(a: Side, b: Side) -> Iterator[Finding]:
    for name, side in (("A", a), ("B", b)):
        if any(result.partial for result in side.results):
            yield _note(name, "it was interrupted: levels or repeats are missing")
        limited = [
            f"{level.concurrency or level.rate:g}"
            for result in side.results
            for level in result.levels
            if level.generator is not None and level.generator.limited
        ]
        if limited:
            yield _note(name, f"the load generator itself was the limit at {', '.join(limited)}")
    pairs = {
        "engine": (_engine(a.first, "manifest_sha256"), _engine(b.first, "manifest_sha256")),
        "server": (a.first.environment.get("server"), b.first.environment.get("server")),
        "seed": (a.first.settings.seed, b.first.settings.seed),
        "token counting": (a.first.token_counting, b.first.token_counting),
    }
    for name, (one, other) in pairs.items():
        if one != other:
            words = (
                "it was built again or differently"
                if name == "engine"
                else f"{_text(one)} in A, {_text(other)} in B"
            )
            yield _note(name, words)


def _note(where: str, message: str) -> Finding:
    return Finding(code=CODE, where=where, message=message, severity="warning")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(item) for item in value.values() if item) or "nothing"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
