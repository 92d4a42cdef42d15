"""One rule of the lint, as data: the table in the README is made of these."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.findings import Finding, Severity


@dataclass(frozen=True, kw_only=True)
class Rule:
    code: str
    """Entry of ``toolchain.core.codes``."""
    says: str
    """What is reported, in one line of the README's table."""
    server: str
    """What tritonserver 2.51 does about it (measured on the CPU build, or read in its sources)."""
    hint: str = ""
    """What to do; a finding may say something more exact."""
    severity: Severity = "error"

    def found(self, where: str, message: str, hint: str = "") -> Finding:
        """A finding of this rule. ``where``: file:line:column; ``message``: what was found and expected."""
        return Finding(
            code=self.code, where=where, message=message, hint=hint or self.hint, severity=self.severity
        )
