"""Supervision of the engine process, with small scripts in its place: what happens when it does not behave."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from toolchain.triton.model_dir import TEMPLATES

READY = 'print(json.dumps({"op": "ready", "model": "m", "max_batch_size": 2, "max_seq_len": 8}), flush=True)'
ECHO = f"""
import json, os, sys
print("noise of a library on stdout", flush=True)
{READY}
for line in sys.stdin:
    message = json.loads(line)
    if message["op"] == "die":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    if message["op"] == "shutdown":
        break
    print(json.dumps({{"echo": message, "pid": os.getpid()}}), flush=True)
"""


@pytest.fixture(scope="module")
def engine_process() -> Any:
    spec = importlib.util.spec_from_file_location("engine_process", TEMPLATES / "local" / "engine_process.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Parent:
    """Starts a script as engine process and keeps what it is told."""

    def __init__(self, module: Any, script: Path, ready_timeout_s: float) -> None:
        self.messages: list[Any] = []
        self.deaths: list[str] = []
        self.log: list[str] = []
        self.changed = threading.Event()
        self.process = module.EngineProcess(
            [sys.executable, str(script)],
            ready_timeout_s=ready_timeout_s,
            on_message=self.messages.append,
            on_death=self.deaths.append,
            log=self.log.append,
        )

    def wait(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 20
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"never happened; log: {self.log}")
            time.sleep(0.01)
        return value


@pytest.fixture
def start(engine_process: Any, tmp_path: Path) -> Iterator[Callable[..., Parent]]:
    parents = []

    def make(script: str, ready_timeout_s: float = 20.0) -> Parent:
        (tmp_path / "engine.py").write_text(script)
        parents.append(Parent(engine_process, tmp_path / "engine.py", ready_timeout_s))
        return parents[-1]

    yield make
    for parent in parents:
        parent.process.stop()


def test_ready_then_messages_both_ways(start: Callable[..., Parent]) -> None:
    parent = start(ECHO)
    parent.process.start()
    assert parent.process.ready["max_batch_size"] == 2
    parent.process.send({"op": "generate", "text": "ß\n"})
    parent.wait(lambda: parent.messages)
    assert parent.messages[0]["echo"] == {"op": "generate", "text": "ß\n"}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            'import json; print(json.dumps({"op": "failed", "message": "shard 2 is truncated"}))',
            "shard 2 is truncated",
        ),
        ("raise SystemExit('no module named toolchain')", "status 1\nno module named toolchain"),
        ("import time; time.sleep(60)", "not ready within 1 s"),
    ],
)
def test_engine_that_does_not_become_ready(
    start: Callable[..., Parent], engine_process: Any, script: str, message: str
) -> None:
    parent = start(script, ready_timeout_s=1.0)
    with pytest.raises(engine_process.EngineFailed) as caught:
        parent.process.start()
    assert message in str(caught.value)


def test_missing_interpreter(engine_process: Any) -> None:
    process = engine_process.EngineProcess(
        ["/no/python"], ready_timeout_s=1, on_message=None, on_death=None, log=None
    )
    with pytest.raises(engine_process.EngineFailed, match="cannot start /no/python"):
        process.start()


def test_death_is_reported_once_and_followed_by_a_restart(
    start: Callable[..., Parent], engine_process: Any
) -> None:
    parent = start(ECHO)
    parent.process.start()
    parent.process.send({"op": "hello"})
    first = parent.wait(lambda: parent.messages)[0]["pid"]
    parent.process.send({"op": "die"})
    parent.wait(lambda: parent.deaths)
    assert parent.deaths == ["the engine process ended with status 3"]
    with pytest.raises(engine_process.EngineFailed, match=r"status 3 and is being restarted"):
        parent.process.send({"op": "too soon"})
    parent.wait(lambda: "the engine process was restarted" in parent.log)
    assert any("last words" in line for line in parent.log)
    parent.process.send({"op": "hello"})
    assert parent.wait(lambda: parent.messages[1:])[0]["pid"] != first


def test_restarts_are_bounded(
    start: Callable[..., Parent], engine_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "MAX_RESTARTS", 2)
    parent = start(f"import json\n{READY}\nraise SystemExit(7)")
    parent.process.start()
    parent.wait(lambda: any("given up after 2 restarts" in line for line in parent.log))
    assert len(parent.deaths) == 3
    with pytest.raises(engine_process.EngineFailed, match="given up after 2 restarts: reload the model"):
        parent.process.send({"op": "hello"})


def test_stop_ends_an_engine_that_ignores_shutdown(
    start: Callable[..., Parent], engine_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "STOP_GRACE_S", 0.2)
    parent = start(f"import json, time\n{READY}\ntime.sleep(60)")
    parent.process.start()
    child = parent.process._process
    parent.process.stop()
    assert child.returncode == -9
    assert parent.deaths == []
