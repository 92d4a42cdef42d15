"""Training inside a launcher of the user's: ``torchrun`` or ``accelerate launch`` start the same command several times.

The first process is the command; the others wait at torch's own store for its training, take part in it, and end.
Nothing is launched then. Several machines need a file system in common: a training is files.
"""

from __future__ import annotations

import atexit
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.progress import Silent
from toolchain.plan.types import Plan

RANK, LOCAL_RANK, WORLD_SIZE = "RANK", "LOCAL_RANK", "WORLD_SIZE"
KEY = "toolchain/training"
PATIENCE = timedelta(days=7)
"""How long the others wait: calibration and evaluation come first."""


def world() -> int:
    """Processes that somebody else started for this command; 1: nobody did."""
    return int(os.environ.get(WORLD_SIZE) or 1) if os.environ.get(RANK) is not None else 1


def follow() -> bool:
    """To be called before anything else: True in a process that was not the first, and has done its part then."""
    if world() == 1:
        return False
    store = _store()
    if int(os.environ[RANK]) == 0:
        atexit.register(_release, store)
        return False
    store.wait([KEY], PATIENCE)
    job = json.loads(store.get(KEY))
    if job is not None:
        from toolchain.qat.worker import run

        options = {name: job[name] for name in ("device", "trust_remote_code")}
        run(Plan.from_json(job["plan"]), Path(job["work"]), progress=Silent(), **options)
    return True


def lead(job: dict[str, Any], devices: int) -> None:
    """Let the others begin. UsageError TC-259 when they are not as many as planned, or this is not the first."""
    if world() != devices or int(os.environ[RANK]) != 0:
        raise UsageError(
            f"--devices {devices}, but WORLD_SIZE is {world()} and RANK is {os.environ.get(RANK)}",
            hint="start as many processes as --devices says, or one alone, which starts the others",
            code="TC-259",
        )
    _store().set(KEY, json.dumps(job))


def _store() -> Any:
    from torch.distributed import rendezvous

    return next(iter(rendezvous("env://", timeout=PATIENCE)))[0]


def _release(store: Any) -> None:
    """Where there was nothing to train, nobody waits for ever."""
    if not store.check([KEY]):
        store.set(KEY, "null")
