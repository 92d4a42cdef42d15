"""The process that sends the load: ``python -m toolchain.bench.generator`` speaks JSON lines with its parent.

In: one object with ``spec``, then one with ``load`` for each load; the end of stdin ends it. Out: ``about`` or
``failed``, once; for each load ``ended`` with the answer of each request as it ends, then ``driven``. Nothing that the
command line, NVML or the server's log do can delay an arrival time here.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import IO, Any

from toolchain.bench.drive import Answer, Driver, Load
from toolchain.bench.targets import make_target
from toolchain.bench.targets.base import Request, TargetSpec
from toolchain.core.errors import ToolchainError


def load_to_json(load: Load) -> dict[str, Any]:
    return asdict(load)


def load_from_json(value: dict[str, Any]) -> Load:
    return Load(**{**value, "requests": [Request(**item) for item in value["requests"]]})


def serve(inbox: IO[str], outbox: IO[str]) -> int:
    """Exit status of the process."""

    def send(value: dict[str, Any]) -> None:
        outbox.write(json.dumps(value) + "\n")
        outbox.flush()

    with asyncio.Runner() as runner:
        target = make_target(TargetSpec(**json.loads(inbox.readline())["spec"]))
        try:
            about = runner.run(target.prepare())
        except ToolchainError as error:
            send({"failed": error.to_json()})
            runner.run(target.close())
            return 1
        send({"about": asdict(about)})
        try:
            for line in inbox:
                _drive(runner, target, load_from_json(json.loads(line)["load"]), send)
        finally:
            runner.run(target.close())
    return 0


def _drive(runner: asyncio.Runner, target: Any, load: Load, send: Any) -> None:
    """Garbage is collected before and not during a load: a collection would stop every request at once."""
    ended: list[Answer] = []
    gc.collect()
    gc.disable()
    try:
        driven = runner.run(Driver(target, load, lambda answer: _note(answer, ended, send)).run())
    finally:
        gc.enable()
    for answer in driven.answers:
        send({"answer": asdict(answer)})
    send({"driven": {**asdict(driven), "answers": []}})


def _note(answer: Answer, ended: list[Answer], send: Any) -> None:
    ended.append(answer)
    send({"ended": len(ended)})


def main() -> int:
    # Whoever starts this process ends it: Ctrl-C on the terminal is for the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    outbox = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the messages
    return serve(sys.stdin, outbox)


if __name__ == "__main__":
    sys.exit(main())
