"""`toolchain status` without a tritonserver: state files, addresses, the status endpoint; and refused updates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.engine_dirs import write_engine
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.serve.admin import AdminServer
from toolchain.serve.foreign import foreign_status
from toolchain.serve.health import Health
from toolchain.serve.state import announced, running_servers, runtime_dir, server_of
from toolchain.serve.update import check_update
from toolchain.triton.render import render_repository

FACTS = {
    "repository": "/r", "log": "/l", "http": "http://127.0.0.1:1", "grpc": "127.0.0.1:2", "metrics": "http://m",
    "status": "http://127.0.0.1:3", "openai": "", "started": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setenv("TOOLCHAIN_RUNTIME_DIR", str(directory))
    return directory


def toolchain(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from toolchain.cli.main import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_server_is_listed_while_it_runs(own_directory: Path) -> None:
    with announced(**FACTS) as state:
        assert running_servers() == [state] and state.pid == os.getpid()
        assert server_of(Path("/r")) == state and server_of(Path("/other")) is None
    assert running_servers() == [] and not list(own_directory.iterdir())


def test_files_of_servers_that_were_killed_are_cleared_away(own_directory: Path) -> None:
    with announced(**FACTS):
        (path,) = own_directory.iterdir()
        told = json.loads(path.read_text())
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            ended.wait()
        # Another process that has the id of a killed server, a process that has gone, and another program's file.
        path.write_text(json.dumps({**told, "started_ticks": told["started_ticks"] - 1}))
        (own_directory / f"{ended.pid}.json").write_text(json.dumps({**told, "pid": ended.pid}))
        (own_directory / "1.json").write_text("[1")
        assert running_servers() == []
        assert not list(own_directory.iterdir())


def test_a_directory_that_others_can_write_is_refused(own_directory: Path) -> None:
    own_directory.mkdir()
    own_directory.chmod(0o777)
    with pytest.raises(ToolchainError, match="mode 777") as caught:
        runtime_dir()
    assert caught.value.code == "TC-634"


def test_status_says_plainly_that_nothing_runs() -> None:
    result = toolchain("status")
    assert result.returncode == 0 and "runs nothing on this machine" in result.stdout
    assert json.loads(toolchain("status", "--json").stdout) == []


def test_status_of_a_server_that_does_not_answer() -> None:
    with announced(**{**FACTS, "status": "http://127.0.0.1:9"}):
        result = toolchain("status")
    assert result.returncode == 1 and "does not answer" in result.stdout


@pytest.mark.parametrize("address", ["nowhere", "host:", "http://host"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        foreign_status(address)


def test_nobody_at_the_address() -> None:
    with pytest.raises(ToolchainError) as caught:
        foreign_status("127.0.0.1:9", timeout_s=1)
    assert caught.value.code == "TC-633"


def test_health_of_the_status_endpoint() -> None:
    health = Health(("a", "b"))
    admin = AdminServer(health, lambda: dict(FACTS), host="127.0.0.1", port=0).start()
    url = f"http://127.0.0.1:{admin.port}"

    def code(path: str) -> int:
        return requests.get(url + path, timeout=10).status_code

    try:
        assert (code("/health/live"), code("/health/ready")) == (200, 503)  # loading
        health.serving = True
        assert code("/health/ready") == 200
        health.update("b", up=False, reason="its stub ended")
        assert code("/health/ready") == 503
        models = requests.get(f"{url}/status", timeout=10).json()["models"]
        assert [(model["name"], model["up"]) for model in models] == [("a", True), ("b", False)]
        health.update("b", up=True)
        health.draining = True
        assert (code("/health/ready"), code("/health/live")) == (503, 200)
        assert admin.answer("/status", "10.0.0.7")[0] == 403
        with pytest.raises(UsageError, match="cannot be used"):
            AdminServer(health, dict, host="127.0.0.1", port=admin.port)
    finally:
        admin.stop()


@pytest.mark.parametrize(
    ("versions", "target", "options", "message"),
    [
        ("latest:1", "local", {}, "runs no server on"),
        ("1", "local", {"grpc_url": "127.0.0.1:9"}, "names its versions"),
        ("latest:1", "trtllm", {"grpc_url": "127.0.0.1:9"}, "has target local, engine new has target trtllm"),
        (
            "latest:1",
            "local",
            {"grpc_url": "127.0.0.1:9", "model_name": "x"},
            "has no model x; it has tensorrt_llm",
        ),
    ],
)
def test_updates_that_are_refused(
    versions: str, target: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    repository = render_repository(write_engine(tmp_path / "old"), tmp_path / "repo", versions=versions)
    engine = write_engine(tmp_path / "new", target=target)
    with pytest.raises(UsageError, match=message) as caught:
        check_update(engine, repository, **options)
    assert caught.value.code == "TC-615"
    assert [path.name for path in (repository / "tensorrt_llm").iterdir() if path.is_dir()] == ["1"]
