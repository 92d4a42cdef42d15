"""Combinations that fail, or failed, in some releases: each with the report that says so."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.findings import Severity
from toolchain.targets.rows import Model, in_range


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a plan would run."""

    version: str
    sm: int
    parts: tuple[tuple[str, Model], ...]
    """(format name, model) of every quantized part; experts are ``moe``."""
    family: str
    is_moe: bool
    backend: str = ""
    """``moe_config.backend``; empty for dense models."""
    experts: int = 0
    """Routed experts of a layer."""
    ranks: int = 1
    """GPUs of one instance: tp x pp."""
    ep: int = 1


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """Empty tuples and zeros mean any."""

    what: str
    """What goes wrong."""
    link: str
    """The issue, pull request or release notes that report it."""
    instead: str
    """What to use."""
    since: str = ""
    """First release known to have it; empty: all before ``until``."""
    until: str = ""
    """First release known without it; empty: none is known."""
    formats: tuple[str, ...] = ()
    sms: tuple[int, ...] = ()
    families: tuple[str, ...] = ()
    model: Model | None = None
    backends: tuple[str, ...] = ()
    more_experts_than: int = 0
    min_ranks: int = 1
    min_ep: int = 1
    severity: Severity = "warning"
    """``error`` where it certainly does not run."""

    def concerns(self, *, version: str, sm: int, format_name: str, model: Model) -> bool:
        """Whether some model and parallelism in this row of a support table is hit."""
        return (
            in_range(version, self.since, self.until)
            and (not self.sms or sm in self.sms)
            and (not self.formats or format_name in self.formats)
            and (self.model is None or model == self.model)
        )

    def hits(self, case: Case) -> bool:
        """Whether this very case is hit."""
        if self.families and case.family not in self.families:
            return False
        if self.model == "moe" and not case.is_moe:
            return False
        if self.backends and case.backend not in self.backends:
            return False
        if case.experts <= self.more_experts_than and self.more_experts_than:
            return False
        if case.ranks < self.min_ranks or case.ep < self.min_ep:
            return False
        parts = case.parts if self.formats else (("", self.model or "dense"),)
        return any(
            self.concerns(version=case.version, sm=case.sm, format_name=name, model=model)
            for name, model in parts
        )
