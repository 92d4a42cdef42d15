"""aiperf as engine of the benchmark: found, asked for the same load, ended whatever it does; and the real one."""

from __future__ import annotations

import http.server
import json
import stat
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from toolchain.bench.aiperf import command, installed, run_aiperf
from toolchain.bench.aiperf.installed import BESIDE, READ_VERSION, require_aiperf
from toolchain.bench.settings import Settings
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Silent

ROOT = Path(__file__).parents[1]


def test_the_lock_installs_the_release_that_is_read() -> None:
    assert f"\naiperf=={READ_VERSION}\n" in (ROOT / "requirements-aiperf.lock").read_text()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_absent_and_other_releases_are_named(tmp_path: Path) -> None:
    for python, words in (
        (tmp_path / "absent", "does not exist"),
        (script(tmp_path / "other", "echo 0.1.0"), "aiperf 0.1.0 is installed, expected"),
        (script(tmp_path / "empty", "echo No package >&2; exit 1"), "has no aiperf: No package"),
    ):
        with pytest.raises(ToolchainError, match=words) as refused:
            require_aiperf(python)
        assert refused.value.code == "TC-711" and "make aiperf" in refused.value.hint


@pytest.mark.parametrize(
    ("target", "settings", "words"),
    [
        ("triton-grpc", {}, "aiperf speaks HTTP only"),
        ("openai", {"trace": "trace.jsonl"}, "a trace"),
        ("openai", {"duration_s": 3.0}, "a duration"),
    ],
)
def test_what_it_cannot_be_asked_for(
    target: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        run_aiperf(url="x", target=target, model="m", tokenizer_dir=tmp_path, settings=Settings(**settings))
    assert refused.value.code == "TC-710"


def run_of(tmp_path: Path, python: Path, **changes: Any) -> command.Run:
    known: dict[str, Any] = {
        "python": python, "url": "http://127.0.0.1:1", "target": "openai", "model": "m", "tokenizer_dir": tmp_path,
        "settings": Settings(timeout_s=0.1, seed=7), "concurrency": 2, "rate": None, "requests": 4,
        "payloads": tmp_path / "requests.json", "artifacts": tmp_path / "artifacts",
    }  # fmt: skip
    return command.Run(**{**known, **changes})


def pairs(run: command.Run) -> dict[str, str]:
    words = command.arguments(run)
    return {word: after for word, after in pairwise(words) if word.startswith("--")}


def test_the_same_load_is_asked_for(tmp_path: Path) -> None:
    closed = pairs(run_of(tmp_path, BESIDE))
    assert (closed["--concurrency"], closed["--request-count"], closed["--random-seed"]) == ("2", "4", "7")
    assert closed["--endpoint-type"] == "completions" and closed["--custom-dataset-type"] == "inputs_json"
    settings = Settings(concurrency=(), rate=(2.5,), arrival="gamma:0.5", max_outstanding=9)
    opened = pairs(
        run_of(tmp_path, BESIDE, settings=settings, concurrency=None, rate=2.5, target="triton-http")
    )
    assert opened["--request-rate"] == "2.5" and opened["--concurrency"] == "9"
    # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
    assert opened["--arrival-pattern"] == "gamma" and float(opened["--arrival-smoothness"]) ** -0.5 == 0.5
    assert opened["--custom-endpoint"] == "/v2/models/m/generate_stream"


def test_the_api_key_is_no_argument_and_offline_is_not_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOLCHAIN_API_KEY", "secret-key")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = tmp_path / "seen"
    python = script(tmp_path / "python", f'env > {seen}; echo "$@" > {seen}.arguments')
    command.execute(run_of(tmp_path, python), Silent(), description="aiperf")
    environment = dict(line.partition("=")[::2] for line in seen.read_text().splitlines())
    assert environment["AIPERF_KEY"] == "secret-key" and "HF_HUB_OFFLINE" not in environment
    assert "secret-key" not in Path(f"{seen}.arguments").read_text()


def test_a_failure_shows_aiperfs_own_words(tmp_path: Path) -> None:
    python = script(tmp_path / "python", "echo '12:00 ERROR    no route to host (x.py:1)'; exit 3")
    with pytest.raises(ToolchainError, match=r"status 3: 12:00 ERROR no route to host") as failed:
        command.execute(run_of(tmp_path, python), Silent(), description="aiperf")
    assert failed.value.code == "TC-713"


def test_one_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "START_S", 0.5)
    python = script(tmp_path / "python", f"sleep 600 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(ToolchainError, match="did not end within"):
        command.execute(run_of(tmp_path, python), Silent(), description="aiperf")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(process: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


PAUSE_S = 0.01


class Chat(http.server.BaseHTTPRequestHandler):
    """Completions of as many words as are asked for, with usage; prompts are kept."""

    prompts: list[str] = []  # noqa: RUF012 - of this one server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("application/json", json.dumps({"data": [{"id": "m", "owned_by": "test"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompts.append(body["prompt"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        count = body["max_tokens"]
        for index in range(count):
            time.sleep(PAUSE_S)
            reason = "length" if index == count - 1 else None
            self._event({"choices": [{"index": 0, "text": " word", "finish_reason": reason}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, value: dict[str, Any]) -> None:
        document = {"id": "x", "object": "text_completion", "created": 1, "model": "m", **value}
        self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        return None


@pytest.fixture
def chat() -> Iterator[str]:
    Chat.prompts.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Chat) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(not BESIDE.is_file(), reason="no aiperf: run `make aiperf`")
def test_the_real_aiperf(chat: str, tiny: Callable[[str], Path]) -> None:
    settings = Settings(concurrency=(1, 2), requests=5, repeats=2, prompt_tokens=9, output_tokens=6)
    found = run_aiperf(
        url=chat, target="openai", model="", tokenizer_dir=tiny("qwen3_moe"), settings=settings
    )
    assert (found.tool, found.target, found.model) == ("aiperf", "openai", "m")
    assert [level.concurrency for level in found.levels] == [1, 2]
    for level in found.levels:
        assert (level.requests, level.errors, len(level.repeats)) == (10, 0, 2)
        assert level.output_tokens == 10 * 6 and level.outstanding_peak == level.concurrency
        assert level.ttft_ms is not None and level.tpot_ms is not None and level.itl_ms is not None
        # The server sleeps that long before every token.
        assert level.ttft_ms.min is not None and level.ttft_ms.min >= PAUSE_S * 1000
        assert level.tpot_ms.count == 10 and level.itl_ms.count == 10 * 5
    # The prompts are those that our own generator makes of the same settings, so the two can be compared.
    from toolchain.bench.prompts import TokenCounter
    from toolchain.bench.work import Work

    work = Work(settings, TokenCounter(tiny("qwen3_moe")))
    ours = [
        request.prompt
        for repeat in range(2)
        for index, level in enumerate(work.levels)
        for request in work.load(level, index=index, repeat=repeat).requests
    ]
    sent = [prompt for prompt in Chat.prompts if prompt in ours]
    assert sorted(sent) == sorted(ours)


def test_without_aiperf_the_benchmark_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(installed.require_aiperf, "__defaults__", (tmp_path / "absent",))
    with pytest.raises(ToolchainError) as refused:
        run_aiperf(
            url="http://127.0.0.1:1",
            target="openai",
            model="",
            tokenizer_dir=tiny("qwen3_moe"),
            settings=Settings(),
        )
    assert refused.value.code == "TC-711"
