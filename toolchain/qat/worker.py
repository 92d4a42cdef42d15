"""One process of a training over several devices: ``python -m toolchain.qat.worker JOB.json``.

Started by ``launch.py`` through Accelerate's launcher, which sets RANK, LOCAL_RANK and WORLD_SIZE. stdin is a pipe of
the process that started it all: where it ends, that process is gone, and so is this one.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import IO

from toolchain.core.files import read_json
from toolchain.core.progress import Progress, Silent
from toolchain.plan.types import Plan
from toolchain.qat.external import LOCAL_RANK, RANK
from toolchain.qat.messages import Sender, write_failure


def main(file: Path) -> int:
    job, rank = read_json(file), int(os.environ[RANK])
    messages = _own_output(file.parent / f"stderr-{rank}.log")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress: Progress = Sender(messages) if rank == 0 else Silent()
    try:
        run(
            Plan.from_json(job["plan"]),
            Path(job["work"]),
            device=job["device"],
            trust_remote_code=job["trust_remote_code"],
            progress=progress,
        )
    except BaseException as error:
        write_failure(file.parent / f"failure-{rank}.json", error)
        raise
    return 0


def run(plan: Plan, work: Path, *, device: str, trust_remote_code: bool, progress: Progress) -> None:
    """The part of this process in the training of ``work``, on its own device; then the group is dissolved."""
    import torch

    from toolchain.modeling.loading import pick_device
    from toolchain.qat.run import train_rank

    target = pick_device(device)
    if target.type == "cuda":
        target = torch.device("cuda", int(os.environ[LOCAL_RANK]))
        torch.cuda.set_device(target)
    try:
        train_rank(plan, work, device=str(target), trust_remote_code=trust_remote_code, progress=progress)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _own_output(path: Path) -> IO[str]:
    """All that libraries print goes to ``path``; what comes back is the real stdout, for messages."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return stdout


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(143)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
