"""How `toolchain serve` ends, and several engines and instances on one server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.engine_dirs import write_engine
from tests.serve_process import TIMEOUT_S, ServeProcess, float_engine, wait_until
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.types import SamplingParams
from toolchain.triton.client import GenerateClient, RequestFailed
from toolchain.triton.install import find_server
from toolchain.triton.sessions import session_members

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`"),
]
PROMPT = "def main(argument):\n    return "
SHORT = {"sampling_param_max_tokens": 24, "sampling_param_ignore_eos": True}
LONG = {"sampling_param_max_tokens": 400, "sampling_param_ignore_eos": True}
FAST = ("--probe-interval-s", "0.5", "--warmup-requests", "1")


@pytest.fixture(scope="module")
def engines(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("engines")
    first = float_engine(tiny("qwen3_moe"), root / "first")
    return first, float_engine(tiny("qwen3_moe"), root / "second", shuffle=1)


def in_process(engine: Path) -> str:
    with LocalEngine.load(engine, device="cpu") as loaded:
        return loaded.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True)).text


def test_two_engines_on_one_server(engines: tuple[Path, Path], tmp_path: Path) -> None:
    with ServeProcess(*engines, repository=tmp_path / "repo", options=(*FAST, "--openai")) as served:
        assert served.info["models"] == ["first", "second"]
        texts = {engine.name: in_process(engine) for engine in engines}
        assert {name: served.ask(PROMPT, model=name, **SHORT) for name in texts} == texts
        for name, text in texts.items():
            body = {"model": name, "prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "temperature": 0}
            answer = requests.post(f"{served.info['openai']}/completions", json=body, timeout=TIMEOUT_S)
            assert answer.json()["choices"][0]["text"] == text
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(TIMEOUT_S) == 0
    assert not list(Path("/dev/shm").glob(f"toolchain_{served.process.pid}_*"))


def test_instances_have_an_engine_each_and_a_second_signal_ends_at_once(
    engines: tuple[Path, Path], tmp_path: Path
) -> None:
    computing = ["--kernels", "off", "--kv-cache", "bf16", "--kv-layout", "static"]
    options = (*FAST, "--instances", "2", *computing)
    with ServeProcess(engines[0], repository=tmp_path / "repo", options=options) as served:
        assert [stub.instance for stub in sorted(served.stubs(), key=lambda stub: stub.instance)] == [
            "tensorrt_llm_0_0",
            "tensorrt_llm_0_1",
        ]
        assert len(served.workers()) == 2
        for worker in served.workers():
            assert (
                Path(f"/proc/{worker}/cmdline").read_bytes().decode().split("\0")[-len(computing) - 1 : -1]
                == computing
            )
        text = in_process(engines[0])
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: served.ask(PROMPT, **SHORT), range(8))) == {text}
        for worker in served.workers():
            os.kill(worker, signal.SIGSTOP)
        with GenerateClient(served.info["grpc"]) as client:
            stream = client.stream(PROMPT, timeout_s=TIMEOUT_S, **LONG)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(lambda: list(stream))
                wait_until(lambda: served.status()["models"][0]["up"], "it is served")
                served.process.send_signal(signal.SIGTERM)
                wait_until(lambda: "draining" in served.errors.read_text(), "it drains")
                served.process.send_signal(signal.SIGTERM)
                assert served.process.wait(TIMEOUT_S) == 128 + signal.SIGTERM
                with pytest.raises(RequestFailed):
                    answer.result()
    assert session_members(served.server_pid) == []
    assert not list(Path("/dev/shm").glob(f"toolchain_{served.process.pid}_*"))


def test_a_stream_that_does_not_end_is_cut_after_the_drain_timeout(
    engines: tuple[Path, Path], tmp_path: Path
) -> None:
    options = (*FAST, "--drain-timeout-s", "5")
    with (
        ServeProcess(engines[0], repository=tmp_path / "repo", options=options) as served,
        GenerateClient(served.info["grpc"]) as client,
    ):
        stream = client.stream(PROMPT, timeout_s=TIMEOUT_S, **LONG)
        next(stream)
        os.kill(served.workers()[0], signal.SIGSTOP)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(TIMEOUT_S) == 3
        with pytest.raises(RequestFailed):
            list(stream)
    assert session_members(served.server_pid) == []
    assert not list(Path("/dev/shm").glob(f"toolchain_{served.process.pid}_*"))


def test_a_model_that_cannot_be_brought_back_ends_it_with_a_status_of_its_own(
    engines: tuple[Path, Path], tmp_path: Path
) -> None:
    options = (*FAST, "--max-recoveries", "0")
    with ServeProcess(engines[0], repository=tmp_path / "repo", options=options) as served:
        os.kill(served.stubs()[0].pid, signal.SIGKILL)
        assert served.process.wait(TIMEOUT_S) == 4
        assert served.process.stdout is not None
        assert json.loads(served.process.stdout.read())["error"]["code"] in ("TC-630", "TC-632")
    assert not list(Path("/dev/shm").glob(f"toolchain_{served.process.pid}_*"))


def test_nothing_is_left_when_serve_itself_is_killed(engines: tuple[Path, Path], tmp_path: Path) -> None:
    with ServeProcess(engines[0], repository=tmp_path / "repo", options=FAST) as served:
        regions = f"toolchain_{served.process.pid}_*"
        assert served.stubs() and list(Path("/dev/shm").glob(regions))
        served.process.kill()
        served.process.wait(TIMEOUT_S)
        wait_until(lambda: not session_members(served.server_pid), "the server's processes have ended")
        wait_until(lambda: not list(Path("/dev/shm").glob(regions)), "its shared memory is gone")


def test_an_engine_that_does_not_load_ends_it_with_status_1(tmp_path: Path) -> None:
    served = ServeProcess(write_engine(tmp_path / "broken"), repository=tmp_path / "repo", options=FAST)
    result = served.run(*served.command[served.command.index("serve") :])
    assert result.returncode == 1
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "TC-622" and "did not start" in error["message"]


def test_options_that_the_repository_would_not_heed_are_refused(
    engines: tuple[Path, Path], tmp_path: Path
) -> None:
    served = ServeProcess(engines[0], repository=tmp_path / "repo")
    assert served.run("triton", str(engines[0]), "--output", str(tmp_path / "repo")).returncode == 0
    result = served.run("serve", str(engines[0]), "--repository", str(tmp_path / "repo"), "--instances", "2")
    assert result.returncode == 2 and "--instances would not be heeded" in result.stderr
