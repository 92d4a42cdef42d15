"""Errors that reach a user: what was found, what was expected, what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from toolchain.core.findings import Finding


class ToolchainError(Exception):
    """One clear failure. Exit status 1.

    ``message`` says what was found and what was expected; ``hint`` says what to do; ``code`` names an entry of
    ``toolchain.core.codes`` that ``toolchain explain`` prints.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", code: str = "TC-000") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def to_json(self) -> dict[str, object]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


class UsageError(ToolchainError):
    """The request itself is off (unknown format, missing directory, tp that does not divide). Exit status 2."""

    exit_code = 2


class FindingsError(ToolchainError):
    """Several problems at once, all of them listed (a plan with violations, a checkpoint that fails its audit)."""

    def __init__(
        self, message: str, findings: Sequence[Finding], *, hint: str = "", code: str = "TC-000"
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.findings = tuple(findings)

    def to_json(self) -> dict[str, object]:
        return {**super().to_json(), "findings": [finding.to_json() for finding in self.findings]}
