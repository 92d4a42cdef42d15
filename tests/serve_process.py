"""`toolchain serve` as users run it: a process of its own, on free ports, with a runtime directory of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
import torch
from transformers import AutoModelForCausalLM

from tests.engine_dirs import write_engine
from toolchain.triton.client import GenerateClient
from toolchain.triton.sessions import session_members
from toolchain.triton.stubs import Stub, find_stubs

PORTS = ("http", "grpc", "metrics", "status", "openai")
TIMEOUT_S = 60.0


def float_engine(source: Path, directory: Path, *, shuffle: int | None = None) -> Path:
    """An engine of the tiny model ``source`` in float32, in which batching decides no tie. ``shuffle``: seed of another
    model of the same shape, whose answers differ."""
    checkpoint = directory.with_name(f"{directory.name}-checkpoint")
    shutil.copytree(source, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if shuffle is not None:
        generator = torch.Generator().manual_seed(shuffle)
        for parameter in model.parameters():
            parameter.data = parameter.data[torch.randperm(parameter.shape[0], generator=generator)]
    model.save_pretrained(checkpoint)
    return write_engine(directory, checkpoint=checkpoint)


class ServeProcess:
    """Context manager: from the moment at which it is ready to its end."""

    def __init__(self, *engines: Path, repository: Path, options: tuple[str, ...] = ()) -> None:
        self.repository = repository
        self.runtime_dir = repository.with_name(f"{repository.name}-run")
        words = [word for port in PORTS for word in (f"--{port}-port", "0")]
        self.command = [
            *(sys.executable, "-c", "from toolchain.cli.main import main; main()", "serve"),
            *(*map(str, engines), "--repository", str(repository), "--json", *words, *options),
        ]
        self.environment = {**os.environ, "TOOLCHAIN_RUNTIME_DIR": str(self.runtime_dir)}

    def __enter__(self) -> Self:
        self.errors = self.repository.with_name(f"{self.repository.name}.stderr")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=errors, text=True, env=self.environment
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.strip(), self.errors.read_text()
        self.info: dict[str, Any] = json.loads(line)
        self.server_pid = self.stubs_parent()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.wait(TIMEOUT_S)

    def stubs_parent(self) -> int:
        """Process id of the tritonserver, which leads a session of its own."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _parent(entry) == self.process.pid and _is_tritonserver(entry):
                return int(entry.name)
        raise AssertionError("no tritonserver")

    def stubs(self) -> list[Stub]:
        return find_stubs(self.server_pid)

    def workers(self) -> list[int]:
        return [
            pid
            for pid in session_members(self.server_pid)
            if b"toolchain.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def ask(
        self, prompt: str, *, model: str = "tensorrt_llm", timeout_s: float = TIMEOUT_S, **inputs: Any
    ) -> str:
        """The whole text of one streamed answer over gRPC."""
        with GenerateClient(self.info["grpc"], model=model) as client:
            return "".join(piece.text for piece in client.stream(prompt, timeout_s=timeout_s, **inputs))

    def status(self) -> dict[str, Any]:
        value: dict[str, Any] = requests.get(f"{self.info['status']}/status", timeout=TIMEOUT_S).json()
        return value

    def ready(self) -> bool:
        return requests.get(f"{self.info['status']}/health/ready", timeout=TIMEOUT_S).status_code == 200

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Another command of the toolchain beside it."""
        command = [sys.executable, "-c", "from toolchain.cli.main import main; main()", *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment, check=False, timeout=120
        )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S} s: {what}"
        time.sleep(0.05)


def _is_tritonserver(entry: Path) -> bool:
    return (entry / "comm").read_text().strip() == "tritonserver"


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
