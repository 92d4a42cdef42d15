"""The worker process of the local runtime, as its parent sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


class Pipe:
    """A worker process and the messages that come out of it."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "toolchain.runtime.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._entries: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any] | bytes) -> None:
        line = message if isinstance(message, bytes) else json.dumps(message).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next message; those of one round one by one."""
        assert self.process.stdout is not None
        if not self._entries:
            message: dict[str, Any] = json.loads(self.process.stdout.readline())
            self._entries = entries_of(message)
        return self._entries.pop(0)

    def answer(self, identity: int) -> list[dict[str, Any]]:
        """All messages of a request up to its end."""
        messages = []
        while True:
            message = self.receive()
            if message["id"] == identity:
                messages.append(message)
                if "finish_reason" in message or message.get("op") == "error":
                    return messages


def entries_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return list(message["chunks"]) if message["op"] == "chunks" else [message]


def copy_in_float32(source: Path, directory: Path) -> Path:
    """In bfloat16 the rounding of a crowded batch may tip a token."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, directory)
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(directory)
    return directory
