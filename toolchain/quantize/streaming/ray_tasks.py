"""How functions of ``worker.py`` are run on a cluster, and what their failures say."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from toolchain.core.errors import ToolchainError
from toolchain.quantize.streaming.journal import Journal
from toolchain.quantize.streaming.worker import ATTEMPTS

RETRIES = 5
"""Times that a task begins again after its worker died: nodes come and go, but memory that is short stays short."""


def remote(ray: Any, function: Callable[..., Any], *, cpus: int, gpus: int = 0) -> Any:
    """``function`` as a task: next to each other on all nodes, since every node has its own way to the storage."""
    return ray.remote(function).options(
        num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
    )


@contextmanager
def attempts_of(journal: Journal) -> Iterator[Path]:
    """A new directory for what the workers of this run write; those of runs that were killed are removed."""
    directory = journal.root / ATTEMPTS / uuid4().hex
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory.parent, ignore_errors=True)


def outcome(ray: Any, ref: Any, what: str) -> Any:
    """What the task gave. ToolchainError as the worker had it, TC-238 for a worker without this package, TC-239 for any
    other end; each names ``what``."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ToolchainError):
            raise type(cause)(f"{what}: {cause.message}", hint=cause.hint, code=cause.code) from error
        if isinstance(cause, ImportError):
            raise ToolchainError(
                f"{what}: a node of the cluster has not the packages of this run: {cause}",
                hint="install the same toolchain on every node",
                code="TC-238",
            ) from error
        raise _lost(what, f"{type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        raise _lost(what, f"{type(error).__name__}, begun {1 + RETRIES} times at most") from error


def _lost(what: str, reason: str) -> ToolchainError:
    return ToolchainError(
        f"{what} could not be made: {reason}",
        hint="`ray status` and the logs of its nodes say why; run the same command again: what is finished is kept",
        code="TC-239",
    )
