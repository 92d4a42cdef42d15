"""The load generator as its user sees it: in a process of its own, or with the engine in this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import IO, Any, Protocol, Self

from toolchain.bench.drive import Answer, Driven, Driver, Load
from toolchain.bench.generator import load_to_json
from toolchain.bench.targets import make_target
from toolchain.bench.targets.base import About, Target, TargetSpec
from toolchain.core.errors import ToolchainError, UsageError

END_S = 5.0
LOG_CHARACTERS = 600


class Sender(Protocol):
    """A target that has been asked once, and what sends loads to it. A context manager."""

    about: About
    own_process: bool
    """Whether its CPU is the generator's alone."""

    def run(self, load: Load, on_ended: Callable[[], None]) -> Driven:
        """Send one load; ``on_ended`` is called after each request."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def start_sender(spec: TargetSpec) -> Sender:
    """Connect to the target. ToolchainError TC-702 when it cannot be measured."""
    return InThisProcess(make_target(spec)) if spec.kind == "inprocess" else InItsProcess(spec)


class InItsProcess:
    """``python -m toolchain.bench.generator``, outside of this terminal's process group."""

    own_process = True

    def __init__(self, spec: TargetSpec) -> None:
        self._busy = False
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "toolchain.bench.generator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            process_group=0,
        )
        try:
            self._send({"spec": asdict(spec)})
            first = self._receive()
            if "failed" in first:
                failed = first["failed"]
                kind = UsageError if failed.get("exit_code") == 2 else ToolchainError
                raise kind(failed["message"], hint=failed.get("hint", ""), code=failed["code"])
            about = first["about"]
            self.about = About(**{**about, "notes": tuple(about["notes"])})
        except BaseException:
            self.close()
            raise

    def run(self, load: Load, on_ended: Callable[[], None]) -> Driven:
        self._busy = True
        self._send({"load": load_to_json(load)})
        answers: list[Answer] = []
        while True:
            message = self._receive()
            if "ended" in message:
                on_ended()
            elif "answer" in message:
                answers.append(Answer(**message["answer"]))
            else:
                self._busy = False
                return Driven(**{**message["driven"], "answers": answers})

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        value: dict[str, Any] = json.loads(line)
        return value

    def _died(self) -> ToolchainError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._log.seek(0)
        said = " ".join(self._log.read().decode("utf-8", errors="replace").split())[-LOG_CHARACTERS:]
        return ToolchainError(
            f"the load generator ended unexpectedly (exit status {self._process.poll()}): {said}",
            hint="see whether memory ran out; otherwise this is a defect, report it",
            code="TC-707",
        )

    def close(self) -> None:
        """End it; at once while it sends."""
        if self._busy:
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InThisProcess:
    """For the engine in this process."""

    own_process = False

    def __init__(self, target: Target) -> None:
        self._runner = asyncio.Runner()
        self._target = target
        try:
            self.about = self._runner.run(self._target.prepare())
        except BaseException:
            self._runner.close()
            raise

    def run(self, load: Load, on_ended: Callable[[], None]) -> Driven:
        return self._runner.run(Driver(self._target, load, lambda answer: on_ended()).run())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._target.close())
        self._runner.close()
