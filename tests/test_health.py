"""Health by inference: the script as images and pods run it, against the real tritonserver and against servers that
lie."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.engine_dirs import write_engine
from toolchain.triton.install import find_server
from toolchain.triton.render import render_repository
from toolchain.triton.server import TritonServer
from toolchain.triton.sessions import session_members

SCRIPT = Path(__file__).resolve().parent.parent / "toolchain" / "deploy" / "templates" / "health.py"


def health(*words: str, proxy: str = "") -> subprocess.CompletedProcess[str]:
    """Isolated: no package of this environment is at hand, as in somebody else's image."""
    environment = {"PATH": os.environ["PATH"], **({"http_proxy": proxy} if proxy else {})}
    command = [sys.executable, "-I", "-S", str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@contextmanager
def answering(answers: dict[str, tuple[int, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """(URL, requests) of a server with one answer for each path."""
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.append((self.path, json.loads(body) if body else None))
            status, value = answers[self.path]
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


MODELS = {"/v1/models": (200, {"data": [{"id": "mine"}]})}
COMPLETION = (200, {"choices": [{"text": " Paris"}]})


def test_openai_server_that_answers() -> None:
    with answering({**MODELS, "/v1/completions": COMPLETION}) as (url, requests):
        ran = health("--openai", url, "--expect", "Paris")
        assert (ran.returncode, ran.stdout) == (0, "healthy: ' Paris'\n")
        path, body = requests[-1]
        assert (path, body["model"], body["max_tokens"]) == ("/v1/completions", "mine", 1)


def test_the_ensemble_of_tensorrt_engines_has_other_names() -> None:
    with answering({"/v2/models/ensemble/generate": (200, {"text_output": "x"})}) as (url, requests):
        assert health("--triton", url, "--model", "ensemble").returncode == 0
        assert set(requests[0][1]) == {"text_input", "max_tokens"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (200, {"error": "the stub process is not healthy"}),
            "not healthy",
        ),  # Triton says so with status 200
        ((500, {"error": "out of memory"}), "status 500"),
        ((200, {"choices": []}), "no text"),
        ((200, {"choices": [{"text": None}]}), "no text"),
        ((200, b"<html>"), "Expecting value"),
        ((200, [1]), "expected an object"),
    ],
)
def test_answers_that_are_none(answer: tuple[int, Any], message: str) -> None:
    with answering({**MODELS, "/v1/completions": answer}) as (url, _):
        ran = health("--openai", url)
        assert ran.returncode == 1 and message in ran.stderr and "Traceback" not in ran.stderr


def test_a_wrong_answer_is_no_health() -> None:
    with answering({**MODELS, "/v1/completions": (200, {"choices": [{"text": "!!!!"}]})}) as (url, _):
        assert health("--openai", url).returncode == 0
        ran = health("--openai", url, "--expect", "Paris")
        assert ran.returncode == 1 and "expected 'Paris'" in ran.stderr


def test_nobody_there_and_nobody_answering() -> None:
    assert health("--openai", "http://127.0.0.1:9").returncode == 1
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ran = health("--triton", f"http://127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.5")
        assert ran.returncode == 1 and "timed out" in ran.stderr


def test_the_proxy_of_the_environment_is_not_asked() -> None:
    with answering({**MODELS, "/v1/completions": COMPLETION}) as (url, _):
        assert health("--openai", url, proxy="http://127.0.0.1:9").returncode == 0


def test_it_wants_one_server() -> None:
    assert health().returncode == 2


@pytest.fixture
def server(tiny: Callable[[str], Path], tmp_path: Path) -> Iterator[TritonServer]:
    if find_server() is None:
        pytest.skip("no tritonserver: run `make tritonserver`")
    engine = write_engine(tmp_path / "engine", checkpoint=tiny("qwen3_moe"))
    with TritonServer(render_repository(engine, tmp_path / "repository"), ready_timeout_s=120) as running:
        yield running


def process(server: TritonServer, name: bytes) -> int:
    assert server.process is not None
    for pid in session_members(server.process.pid):
        if name in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(f"no process {name!r}")


@pytest.mark.server
def test_a_real_tritonserver_alive_hurt_and_with_a_dead_stub(server: TritonServer) -> None:
    """The stub's death is what the server itself keeps silent about."""
    import requests

    words = ("--triton", server.http_url, "--timeout", "30")
    assert health(*words).returncode == 0
    told = health(*words, "--prompt", "def ", "--max-tokens", "4").stdout
    text = told.removeprefix("healthy: ").strip()[1:-1]
    wrong = health(*words, "--prompt", "def ", "--max-tokens", "4", "--expect", f"{text}, surely")
    assert wrong.returncode == 1 and "expected" in wrong.stderr
    os.kill(process(server, b"toolchain.runtime.worker"), signal.SIGKILL)
    restarting = health(*words)
    assert restarting.returncode == 1 and "unhealthy" in restarting.stderr
    deadline = time.monotonic() + 60
    while health(*words).returncode and time.monotonic() < deadline:
        time.sleep(0.5)
    assert health(*words).returncode == 0  # the model starts its engine process again
    os.kill(process(server, b"triton_python_backend_stub"), signal.SIGKILL)
    dead = health("--triton", server.http_url, "--timeout", "5")
    assert dead.returncode == 1 and "unhealthy" in dead.stderr
    # It says so unless the stub has taken it along, as one that was killed while it held a lock does.
    url = f"{server.http_url}/v2/health/ready"
    assert server.has_ended(within_s=0) or requests.get(url, timeout=10).status_code == 200
