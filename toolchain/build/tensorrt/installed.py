"""trtllm-build on this machine: where it is, of which release, and for which GPUs it would build."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from toolchain.build.tensorrt.command import PROGRAM

DISTRIBUTIONS = ("tensorrt_llm", "tensorrt-llm")
QUERY_TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True)
class Installed:
    program: Path
    version: str | None
    """Release of the tensorrt_llm package beside the program; None where it cannot be told."""


def find_installed() -> Installed | None:
    """The ``trtllm-build`` on PATH; None where there is none.

    It may be in an environment of its own (TensorRT-LLM 1.2.1 and today's ModelOpt pin different packages), so its
    release is read from the metadata in that environment.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        return None
    program = Path(found)
    return Installed(program=program, version=_version_beside(program))


def _version_beside(program: Path) -> str | None:
    """From ``<prefix>/lib/python3.*/{site,dist}-packages``; the prefix of a program is two levels up."""
    for prefix in dict.fromkeys((program.parent.parent, program.resolve().parent.parent)):
        places = [
            str(path)
            for pattern in ("lib*/python3*/site-packages", "lib*/python3*/dist-packages")
            for path in sorted(prefix.glob(pattern))
        ]
        for name in DISTRIBUTIONS:
            for distribution in distributions(path=places, name=name):
                return distribution.version
    return None


def local_sms() -> tuple[int, ...]:
    """SM versions of the GPUs of this machine, by nvidia-smi; empty where it is missing or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        answer = subprocess.run(
            [program, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=QUERY_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    lines = [line.strip().replace(".", "") for line in answer.splitlines()]
    return tuple(int(line) for line in lines if line.isdigit())
