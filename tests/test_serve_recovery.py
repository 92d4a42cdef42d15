"""How often models and servers are brought back, where the server ends under it: without a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolchain.serve import recovery
from toolchain.serve.recovery import GaveUp, Recovery
from toolchain.triton.client import RequestFailed


class Ended:
    """What recovery asks of a tritonserver that has ended: nothing listens on its port."""

    grpc_url = "127.0.0.1:9"
    process = None

    def __init__(self, log_file: Path) -> None:
        self.log_file, self.restarts = log_file, 0

    def has_ended(self, *, within_s: float) -> bool:
        return True

    def restart(self) -> None:
        self.restarts += 1


@pytest.fixture
def server(tmp_path: Path) -> Any:
    log = tmp_path / "log"
    log.write_text("the end\n")
    return Ended(log)


def test_a_server_that_took_five_models_along_is_one_recovery(server: Any) -> None:
    brought_back = Recovery(server, max_recoveries=1, window_s=600.0, ready_timeout_s=5.0)
    assert [brought_back.recover(f"model{number}", hung=False) for number in range(5)] == [False] * 5
    brought_back.restart_server()
    assert server.restarts == 1
    with pytest.raises(GaveUp, match="brought back 1 times"):
        brought_back.restart_server()


def test_nobody_waits_for_the_engine_of_a_server_that_has_ended(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = SimpleNamespace(pid=1, model="model")
    server.process = SimpleNamespace(pid=1)
    monkeypatch.setattr(recovery, "find_stubs", lambda session: [stub])
    monkeypatch.setattr(recovery, "descendants", lambda pid: [2])
    monkeypatch.setattr(recovery, "kill", lambda pid: None)
    monkeypatch.setattr(recovery, "kill_tree", lambda pid: None)
    asked: list[str] = []

    def silent(url: str, model: str, *, timeout_s: float) -> float:
        asked.append(model)
        raise RequestFailed("connection refused", code="TC-702")

    monkeypatch.setattr(recovery, "probe_engine", silent)
    brought_back = Recovery(server, max_recoveries=1, window_s=600.0, ready_timeout_s=100.0)
    assert brought_back.recover("model", hung=True) is False
    assert asked == ["model"]
