"""Audit of written bytes: ``audit(directory)`` lists every finding. Nothing here trusts the model in memory.

One file per kind of rule: ``layout`` (names, dtypes, shapes), ``excluded`` (the quantization config), ``values`` (the
numbers), ``sizes`` (the plan's arithmetic).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.checkpoint.audit import excluded, layout, sizes, values
from toolchain.checkpoint.audit.subject import open_subject, read_plan_beside
from toolchain.checkpoint.source import open_source
from toolchain.core.findings import Finding
from toolchain.core.findings import errors as only_errors
from toolchain.core.progress import Progress, Silent


@dataclass(frozen=True, kw_only=True)
class Verdict:
    directory: str
    findings: tuple[Finding, ...]
    facts: dict[str, Any]
    """What was counted: tensors, bytes, quantized modules, effective bits."""

    @property
    def passed(self) -> bool:
        return not only_errors(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "directory": self.directory,
            "passed": self.passed,
            "facts": self.facts,
            "findings": [finding.to_json() for finding in self.findings],
        }


def audit(directory: Path, *, against: Path | None = None, progress: Progress | None = None) -> Verdict:
    """Every rule on the checkpoint in ``directory``; with ``against`` also bit equality of what is not quantized.

    Raises ToolchainError only when the directory cannot be read as a quantized checkpoint (no config, damaged shard).
    """
    progress = progress or Silent()
    subject = open_subject(directory)
    findings = [
        *layout.stored_tensors(subject),
        *layout.leaked_scales(subject),
        *layout.inventory(subject),
        *layout.roles(subject),
        *excluded.exclude_list(subject),
        *excluded.both_places_agree(subject),
        *excluded.kv_cache(subject),
    ]
    plan = read_plan_beside(directory)
    if plan is not None:
        findings += sizes.against_plan(subject, plan)
    findings += sizes.anything_quantized(subject)
    findings += values.scales(subject, progress)
    findings += values.fused_scales(subject)
    if against is not None:
        findings += values.against_source(subject, open_source(against), progress)
    return Verdict(directory=str(directory), findings=tuple(findings), facts=sizes.facts(subject))


__all__ = ["Verdict", "audit"]
