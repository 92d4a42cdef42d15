"""What is said when a layer fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from toolchain.core.errors import ToolchainError


@contextmanager
def naming(layer: int, path: str) -> Iterator[None]:
    """Errors inside say which layer they are of. ToolchainError TC-234 for those that had no code."""
    try:
        yield
    except ToolchainError as error:
        raise ToolchainError(
            f"layer {layer} ({path}): {error.message}", hint=error.hint, code=error.code
        ) from error
    except (RuntimeError, ArithmeticError, ValueError, MemoryError) as error:
        raise ToolchainError(
            f"layer {layer} ({path}): {type(error).__name__}: {error}",
            hint="the layers before it are kept: mend the reason and run the same command again",
            code="TC-234",
        ) from error
