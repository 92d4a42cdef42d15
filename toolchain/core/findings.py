"""A finding: one numbered problem (or warning) with its place. Plans, audits and lints all report these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    code: str
    """Entry of ``toolchain.core.codes``, such as ``TC-101``."""
    where: str
    """Tensor, module, option or file:line that the finding is about."""
    message: str
    """What was found and what was expected."""
    hint: str = ""
    """What to do next."""
    severity: Severity = "error"

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.code} {self.severity}: {self.where}: {self.message}"
        return f"{text}; {self.hint}" if self.hint else text


def errors(findings: list[Finding] | tuple[Finding, ...]) -> list[Finding]:
    """The findings that forbid going on."""
    return [finding for finding in findings if finding.severity == "error"]
