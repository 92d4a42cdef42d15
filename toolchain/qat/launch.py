"""Training over several devices of this machine: Accelerate's own launcher, one process per device.

Nothing of the user's Accelerate configuration is read: every setting is given, and the configuration file too, which it
would otherwise look for in the home directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import atomic_write_json
from toolchain.core.processes import end_group, sigterm_raises
from toolchain.core.progress import Progress, Silent
from toolchain.plan.types import Plan
from toolchain.qat import external
from toolchain.qat.external import LOCAL_RANK, RANK, WORLD_SIZE
from toolchain.qat.messages import Receiver, read_failure

DIRECTORY, LAUNCHER_LOG = "processes", "launcher.log"
GRACE_S = 10.0
"""Between SIGTERM and SIGKILL."""
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


def launch(
    plan: Plan,
    work: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Train ``work`` (its start state is there) on ``plan.training.devices`` devices; results are its files.

    When one process ends early all are ended, and ToolchainError TC-257 has its last lines; an error of this toolchain
    is raised as it was in that process. However this function ends, no process is left: workers end when the pipe from
    here does. UsageError TC-259 for more devices than there are. Where another launcher started several processes
    already, they train (``external.py``).
    """
    devices = plan.training.devices if plan.training else 1
    cuda = _require_devices(device, devices)
    job = {
        "plan": plan.to_json(),
        "work": str(work.absolute()),
        "device": "cuda" if cuda else "cpu",
        "trust_remote_code": trust_remote_code,
    }
    if external.world() > 1:
        from toolchain.qat.worker import run

        external.lead(job, devices)
        options: dict[str, Any] = {"device": job["device"], "trust_remote_code": trust_remote_code}
        run(plan, work, progress=progress or Silent(), **options)
        return
    directory = work / DIRECTORY
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    atomic_write_json(directory / "job.json", job)
    atomic_write_json(directory / "accelerate.json", _settings(devices))
    with (directory / LAUNCHER_LOG).open("wb") as log, sigterm_raises():
        process = _spawn(_command(directory, devices), log)
        try:
            _follow(process, Receiver(progress or Silent()))
            status = process.wait()
        finally:
            _end(process)
    if status:
        raise read_failure(directory) or _died(directory, status)
    shutil.rmtree(directory)


def _require_devices(name: str, devices: int) -> bool:
    """Whether they are CUDA devices."""
    import torch

    from toolchain.modeling.loading import pick_device

    cuda = pick_device(name).type == "cuda"
    if cuda and external.world() == 1 and torch.cuda.device_count() < devices:
        raise UsageError(
            f"--devices {devices}: this machine has {torch.cuda.device_count()} CUDA devices",
            hint=f"use --devices {torch.cuda.device_count()}, with more --accumulate for the same batch",
            code="TC-259",
        )
    return cuda


def _settings(devices: int) -> dict[str, Any]:
    """Accelerate's configuration file. MULTI_GPU on CPUs, too: else it wants MPI to start several processes; what they
    compute on is for them to say."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "no",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": devices,
        "gpu_ids": "all",
        "use_cpu": False,
        "debug": False,
    }


def _command(directory: Path, devices: int) -> list[str]:
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // devices))
    options = {
        "config_file": directory / "accelerate.json",
        "num_processes": devices,
        "num_machines": 1,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "num_cpu_threads_per_process": threads,
        "main_process_ip": "127.0.0.1",
        "main_process_port": 0,  # any that is free
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *words]
    return [*start, "-m", "toolchain.qat.worker", str(directory / "job.json")]


def _spawn(command: list[str], log: Any) -> subprocess.Popen[str]:
    """In a session of its own: Ctrl-C reaches only us. Its stdin, which the workers inherit, ends when we do."""
    package = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    drop = {RANK, LOCAL_RANK, WORLD_SIZE}
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        errors="replace",
        env={**environment, "PYTHONPATH": path},
        start_new_session=True,
    )


def _follow(process: subprocess.Popen[str], receiver: Receiver) -> None:
    for line in process.stdout or ():
        receiver.read(line)


def _end(process: subprocess.Popen[str]) -> None:
    """Close the pipe, on which the workers end, and end what is left."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    end_group(process, GRACE_S)


def _died(directory: Path, status: int) -> ToolchainError:
    """TC-257 with the last lines of the process that failed first, as the launcher says which that was."""
    log = (directory / LAUNCHER_LOG).read_text(encoding="utf-8", errors="replace")
    found = _ROOT_CAUSE.search(log)
    if found is None:
        return _ended("the launcher", f"with status {status}", log)
    rank, code = int(found[1]), int(found[2])
    file = directory / f"stderr-{rank}.log"
    said = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return _ended(f"process {rank} of the training", how, said or log)


def _ended(who: str, how: str, said: str) -> ToolchainError:
    last = "\n".join(said.strip().splitlines()[-8:]) or "(nothing)"
    return ToolchainError(
        f"{who} ended {how}, and all others were ended. Its last lines:\n{last}",
        hint="SIGKILL is most often memory. The same command goes on from the newest checkpoint",
        code="TC-257",
    )
