"""Audit of written bytes: ``audit(directory)`` lists every finding. Nothing here trusts the model in memory.

One file per kind of rule: ``layout`` (names, dtypes, shapes), ``excluded`` (the quantization config), ``values`` (the
numbers, read by ``scan``), ``sparsity`` (zeros that were promised), ``sizes`` (the plan's arithmetic), ``runtime`` (one
release of TensorRT-LLM), ``against`` (the source).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.checkpoint.audit import excluded, layout, runtime, sizes, sparsity, values
from toolchain.checkpoint.audit.runtime import Runtime
from toolchain.checkpoint.audit.subject import Subject, open_subject, read_plan_beside
from toolchain.checkpoint.source import open_source
from toolchain.core.findings import Finding
from toolchain.core.findings import errors as only_errors
from toolchain.core.progress import Progress, Silent

TOP = 20
"""Matrices listed as the furthest from the source."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    directory: str
    findings: tuple[Finding, ...]
    facts: dict[str, Any]
    """What was counted: tensors, bytes, quantized modules, effective bits."""
    errors: dict[str, Any] = field(default_factory=dict)
    """With a source: relative errors per format, and the worst matrices."""

    @property
    def passed(self) -> bool:
        return not only_errors(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "directory": self.directory,
            "passed": self.passed,
            "facts": self.facts,
            **({"errors": self.errors} if self.errors else {}),
            "findings": [finding.to_json() for finding in self.findings],
        }


def audit(
    directory: Path,
    *,
    against: Path | None = None,
    target: Runtime | None = None,
    top: int = TOP,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Every rule on the checkpoint in ``directory``.

    ``against``: a source; what is not quantized must be bit-equal to it, and what is quantized as near as rounding
    allows. ``target``: a release of TensorRT-LLM that must be able to load it. Raises ToolchainError only when the
    directory cannot be read as a quantized checkpoint (no config, damaged shard).
    """
    progress = progress or Silent()
    subject = open_subject(directory)
    # Threads read the bytes while the rules on names and shapes run here.
    scan = values.start(subject, threads=threads)
    try:
        findings = list(_by_headers(subject, target))
        seen = scan.result(progress)
    finally:
        scan.close()
    findings += values.numbers(subject, seen)
    findings += values.fused_scales(subject, seen)
    findings += values.outlier_experts(subject, seen)
    zeros, counted = sparsity.groups(subject, progress)
    findings += zeros
    errors: dict[str, Any] = {}
    if against is not None:
        from toolchain.checkpoint.audit.against import Comparison

        comparison = Comparison(subject, open_source(against), progress)
        findings += comparison.findings()
        errors = comparison.report(top)
    facts = {**sizes.facts(subject), **counted}
    return Verdict(directory=str(directory), findings=tuple(findings), facts=facts, errors=errors)


def _by_headers(subject: Subject, target: Runtime | None) -> Iterator[Finding]:
    yield from layout.stored_tensors(subject)
    yield from layout.leaked_scales(subject)
    yield from layout.inventory(subject)
    yield from layout.roles(subject)
    yield from excluded.exclude_list(subject)
    yield from excluded.both_places_agree(subject)
    yield from excluded.group_size(subject)
    yield from excluded.kv_cache(subject)
    plan = read_plan_beside(subject.directory)
    if plan is not None:
        yield from sizes.against_plan(subject, plan)
    yield from sizes.anything_quantized(subject)
    if target is not None:
        yield from runtime.for_runtime(subject, target)


__all__ = ["Runtime", "Verdict", "audit"]
