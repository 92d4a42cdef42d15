"""Pick a declared thing by its name, or say which names there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from toolchain.core.errors import UsageError


class Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def pick(items: Iterable[N], name: str, *, kind: str, hint: str, code: str) -> N:
    """The item called ``name``; UsageError ``code`` lists the alternatives."""
    found = {item.name: item for item in items}
    if name not in found:
        raise UsageError(f"unknown {kind} {name!r}; known: {', '.join(found)}", hint=hint, code=code)
    return found[name]
