"""Gates: limits on what quantization may cost. An engine that fails one is marked as not fit to serve.

The mark is ``gates.json`` in the engine's directory, and holds for the bytes that were judged: other bytes, no mark.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from toolchain.core.errors import FindingsError, ToolchainError, UsageError
from toolchain.core.files import atomic_write_json, read_json, sha256_json
from toolchain.core.findings import Finding

FILE = "gates.json"
METRICS = {
    "max_kl": "kl_mean",
    "max_ppl_increase": "ppl_increase",
    "min_top1": "top1_agreement",
    "min_router_agreement": "router_agreement",
}
"""Gate -> key of the evaluation report that it limits."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits; None: no limit. Field names are those of the options."""

    max_kl: float | None = None
    """Largest mean KL(baseline || quantized), nats per token."""
    max_ppl_increase: float | None = None
    """Largest ppl / baseline_ppl - 1: 0.01 allows 1 %."""
    min_top1: float | None = None
    """Least share of tokens at which both models prefer the same next token, 0 to 1."""
    min_router_agreement: float | None = None
    """Least share of expert choices in common with the source, 0 to 1; for MoE models."""

    def __post_init__(self) -> None:
        """UsageError TC-530 for limits that no measurement can be compared with."""
        for name, limit in self.asked.items():
            highest = 1.0 if name.startswith("min_") else math.inf
            if not 0 <= limit <= highest:
                raise UsageError(
                    f"{option(name)} {limit} (expected {'0 to 1' if highest == 1 else 'at least 0'})",
                    hint="shares are 0 to 1: --min-top1 0.98 asks for 98 %, --max-ppl-increase 0.01 allows 1 %",
                    code="TC-530",
                )

    def require_baseline(self, baseline: str | None) -> None:
        """UsageError TC-530 when there are gates and nothing to compare with."""
        if self.asked and baseline is None:
            raise UsageError(
                f"{', '.join(map(option, self.asked))}: gates are judged against the source model",
                hint="give --baseline MODEL",
                code="TC-530",
            )

    @property
    def asked(self) -> dict[str, float]:
        return {
            item.name: float(getattr(self, item.name))
            for item in fields(self)
            if getattr(self, item.name) is not None
        }


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One gate after the measurement."""

    gate: str
    limit: float
    value: float | None
    """None where it was not measured: such a gate is not passed."""
    passed: bool
    tokens: int | None = None
    """Scored tokens behind ``value``."""
    data: str | None = None
    """``token_hash`` of the text that was judged on."""


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def judge(report: dict[str, Any], gates: Gates) -> tuple[Judged, ...]:
    """Each asked gate against an evaluation report. What is missing or not a number does not pass."""
    found = []
    for name, limit in gates.asked.items():
        value = report.get(METRICS[name])
        low, high = (limit, math.inf) if name.startswith("min_") else (-math.inf, limit)
        found.append(
            Judged(
                gate=name,
                limit=limit,
                value=value,
                passed=value is not None and low <= value <= high,
                tokens=report.get("tokens"),
                data=report.get("data", {}).get("token_hash"),
            )
        )
    return tuple(found)


def findings(judged: tuple[Judged, ...], where: str) -> list[Finding]:
    """One TC-531 per gate that was not passed."""
    return [
        Finding(
            code="TC-531",
            where=where,
            message=f"{METRICS[item.gate]} is {_figure(item)}, {option(item.gate)} asks for "
            f"{'at least' if item.gate.startswith('min_') else 'at most'} {item.limit:g}",
            hint="try --recipe best, a format with more bits, or --format auto; or another limit",
        )
        for item in judged
        if not item.passed
    ]


def _figure(item: Judged) -> str:
    return "not measured" if item.value is None else f"{item.value:.6g} on {item.tokens} tokens"


def apply_gates(directory: Path, report: dict[str, Any], gates: Gates) -> list[Finding]:
    """Judge ``report`` of ``directory`` and write the result into it (``gates``, ``fit``); an engine is marked, too.
    Returns what was not passed."""
    judged = judge(report, gates)
    report["gates"] = [asdict(item) for item in judged]
    report["fit"] = all(item.passed for item in judged)
    if judged and (directory / "engine.json").is_file():
        files = read_json(directory / "engine.json").get("files", {})
        mark(directory, judged, checkpoint=checkpoint_identity(files))
    return findings(judged, str(directory))


def mark(engine: Path, judged: tuple[Judged, ...], *, checkpoint: str) -> tuple[Judged, ...]:
    """Write ``gates.json`` of ``engine`` and return all that it holds now.

    A gate judged again replaces its old result; others on the same bytes stay. ``checkpoint``: see
    ``checkpoint_identity``.
    """
    kept = {item.gate: item for item in _read(engine, checkpoint)}
    kept |= {item.gate: item for item in judged}
    results = tuple(kept[name] for name in METRICS if name in kept)
    if results:
        atomic_write_json(
            engine / FILE,
            {
                "schema_version": 1,
                "checkpoint": checkpoint,
                "fit": all(item.passed for item in results),
                "gates": [asdict(item) for item in results],
            },
        )
    else:
        (engine / FILE).unlink(missing_ok=True)
    return results


def checkpoint_identity(files: dict[str, str]) -> str:
    """One hash over the checkpoint's part of ``files`` (engine.json: path -> SHA-256)."""
    return sha256_json({path: digest for path, digest in files.items() if path.startswith("checkpoint/")})


def require_fit(engine: Path, manifest: dict[str, Any], *, allow_unfit: bool) -> None:
    """FindingsError TC-532 when ``engine`` failed a gate with the bytes that ``manifest`` (engine.json) names."""
    failed = findings(_read(engine, checkpoint_identity(manifest.get("files", {}))), str(engine))
    if failed and not allow_unfit:
        raise FindingsError(
            f"{engine} failed its gates and is marked as not fit to serve",
            failed,
            hint="--allow-unfit goes on all the same",
            code="TC-532",
        )


def _read(engine: Path, checkpoint: str) -> tuple[Judged, ...]:
    if not (engine / FILE).is_file():
        return ()
    value = read_json(engine / FILE)
    try:
        return tuple(Judged(**item) for item in value["gates"]) if value["checkpoint"] == checkpoint else ()
    except (KeyError, TypeError) as error:
        raise ToolchainError(
            f"{engine / FILE} is damaged: {type(error).__name__}: {error}",
            hint="`toolchain evaluate` with the gates writes it again; without it no gate counts",
            code="TC-533",
        ) from error
