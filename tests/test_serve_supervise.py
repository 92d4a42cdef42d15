"""`toolchain serve` on the real tritonserver: models that die or hang come back, and a rolling update loses nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.engine_dirs import write_engine
from tests.serve_process import TIMEOUT_S, ServeProcess, float_engine, wait_until
from toolchain.core.files import sha256_file
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


@pytest.fixture(scope="module")
def engines(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two engines of one shape with different answers."""
    root = tmp_path_factory.mktemp("engines")
    first = float_engine(tiny("qwen3_moe"), root / "first")
    return first, float_engine(tiny("qwen3_moe"), root / "second", shuffle=1)


@pytest.fixture(scope="module")
def texts(engines: tuple[Path, Path]) -> tuple[str, str]:
    """The answer of each in process."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    answers = []
    for path in engines:
        with LocalEngine.load(path, device="cpu") as engine:
            answers.append(engine.generate(PROMPT, params).text)
    assert answers[0] != answers[1]
    return answers[0], answers[1]


@pytest.fixture(scope="module")
def served(engines: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    repository = tmp_path_factory.mktemp("served") / "repo"
    options = ("--openai", "--probe-interval-s", "0.5", "--hang-timeout-s", "3", "--warmup-requests", "3")
    options += ("--max-recoveries", "20")  # all of them happen within its window
    with ServeProcess(engines[0], repository=repository, options=options) as process:
        yield process


def test_status_names_engine_and_manifest_and_asks_the_model(
    served: ServeProcess, engines: tuple[Path, Path]
) -> None:
    result = served.run("status", "--json")
    assert result.returncode == 0, result.stderr
    (server,) = json.loads(result.stdout)
    (model,) = server["models"]
    assert server["state"]["pid"] == served.process.pid and server["healthy"]
    assert (model["name"], model["engine"], model["versions"]) == ("tensorrt_llm", "first", [1])
    assert model["manifest_sha256"] == sha256_file(engines[0] / "engine.json")
    assert model["probe_ms"] > 0
    assert "first" in served.run("status").stdout


@pytest.mark.parametrize("kind", ["grpc", "http", "openai"])
def test_status_of_any_address(served: ServeProcess, kind: str) -> None:
    result = served.run("status", served.info[kind], "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == ("openai" if kind == "openai" else f"triton-{kind}")


def test_prometheus_metrics_of_the_supervision(served: ServeProcess) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    text = requests.get(f"{served.info['status']}/metrics", timeout=TIMEOUT_S).text
    samples = {
        sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert samples["toolchain_serve_model_up"].value == 1
    assert samples["toolchain_serve_model_up"].labels == {"model": "tensorrt_llm"}
    assert samples["toolchain_serve_draining"].value == 0
    assert requests.get(f"{served.info['status']}/health/live", timeout=TIMEOUT_S).status_code == 200
    assert requests.get(f"{served.info['status']}/elsewhere", timeout=TIMEOUT_S).status_code == 404


def test_stub_killed_in_mid_stream(served: ServeProcess, texts: tuple[str, str]) -> None:
    """Clients of gRPC get an error within their timeout, those of the OpenAI endpoint at once; the model comes back."""
    recovered = served.status()["models"][0]["recoveries"]
    body = {"model": "tensorrt_llm", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    url = f"{served.info['openai']}/completions"
    with (
        GenerateClient(served.info["grpc"]) as client,
        requests.post(url, json=body, stream=True, timeout=TIMEOUT_S) as answer,
    ):
        stream = client.stream(PROMPT, timeout_s=5.0, **LONG)
        next(stream)
        lines = answer.iter_lines()
        next(lines)
        (stub,) = served.stubs()
        os.kill(stub.pid, signal.SIGKILL)
        told = b"\n".join(lines).decode()  # ends, and not by a timeout of ours
        assert "error" in told and 'finish_reason":"length' not in told
        with pytest.raises(RequestFailed):
            list(stream)
    wait_until(served.ready, "the model is back")
    served.server_pid = served.stubs_parent()  # the stub may have taken it along
    assert served.status()["models"][0]["recoveries"] >= recovered + 1
    assert served.stubs()[0].pid != stub.pid
    assert served.ask(PROMPT, **SHORT) == texts[0]


def test_engine_that_hangs_is_started_again(served: ServeProcess, texts: tuple[str, str]) -> None:
    (worker,) = served.workers()
    os.kill(worker, signal.SIGSTOP)
    with (
        GenerateClient(served.info["grpc"]) as client,
        pytest.raises(RequestFailed, match="ended with status -9"),
    ):
        list(client.stream(PROMPT, timeout_s=TIMEOUT_S, **SHORT))
    wait_until(served.ready, "the model is back")
    assert worker not in served.workers()
    assert served.ask(PROMPT, **SHORT) == texts[0]


def test_tritonserver_that_dies_is_started_again(served: ServeProcess, texts: tuple[str, str]) -> None:
    """On the same ports; the OpenAI endpoint outlives it."""
    os.kill(served.server_pid, signal.SIGKILL)
    wait_until(lambda: not served.ready(), "it is noticed")
    wait_until(served.ready, "the server is back")
    served.server_pid = served.stubs_parent()
    assert served.ask(PROMPT, **SHORT) == texts[0]
    body = {"model": "tensorrt_llm", "prompt": PROMPT, "max_tokens": 24, "ignore_eos": True, "temperature": 0}
    answer = requests.post(f"{served.info['openai']}/completions", json=body, timeout=TIMEOUT_S)
    assert answer.json()["choices"][0]["text"] == texts[0]


def test_tritonserver_that_dies_while_a_model_is_brought_back(
    served: ServeProcess, texts: tuple[str, str]
) -> None:
    """As it does now and then when a stub was killed while it held a lock."""
    recovered = served.status()["models"][0]["recoveries"]
    os.kill(served.stubs()[0].pid, signal.SIGKILL)
    wait_until(lambda: not served.ready(), "it is noticed")
    os.kill(served.server_pid, signal.SIGKILL)
    wait_until(served.ready, "the server is back")
    served.server_pid = served.stubs_parent()
    assert served.status()["models"][0]["recoveries"] >= recovered + 2
    assert served.ask(PROMPT, **SHORT) == texts[0]


def test_rolling_update_loses_no_request(
    served: ServeProcess, engines: tuple[Path, Path], texts: tuple[str, str]
) -> None:
    done = threading.Event()
    recovered = served.status()["models"][0]["recoveries"]

    def client(_: int) -> Counter[str]:
        answers: Counter[str] = Counter()
        while not done.is_set():
            answers[served.ask(PROMPT, **SHORT)] += 1  # any error fails the test
        return answers

    with ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(client, number) for number in range(4)]
        try:
            result = served.run(
                "triton", "update", str(engines[1]), "--repository", str(served.repository), "--json"
            )
        finally:
            done.set()
        total = sum((count.result() for count in counts), Counter())
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["version"], told["replaced"]) == (2, [1])
    assert set(total) == set(texts) and min(total.values()) > 0
    assert served.ask(PROMPT, **SHORT) == texts[1]
    assert [path.name for path in (served.repository / "tensorrt_llm").iterdir() if path.is_dir()] == ["2"]
    assert [stub.version for stub in served.stubs()] == [2]
    assert served.status()["models"][0]["recoveries"] == recovered  # the old stub was not missed
    assert json.loads(served.run("status", "--json").stdout)[0]["models"][0]["engine"] == "second"


def test_a_new_version_that_does_not_load_changes_nothing(
    served: ServeProcess, texts: tuple[str, str], tmp_path: Path
) -> None:
    broken = write_engine(tmp_path / "broken")
    before = served.stubs()
    result = served.run("triton", "update", str(broken), "--repository", str(served.repository))
    assert result.returncode == 1
    assert "TC-616" in result.stderr and "did not start" in result.stderr
    assert served.stubs() == before
    assert not (served.repository / "tensorrt_llm" / "3").exists()
    assert served.ask(PROMPT, **SHORT) == texts[1]


def test_sigterm_under_load_ends_every_started_stream(served: ServeProcess) -> None:
    """The last test of this server; requests that the dead stub has left behind do not hold it up."""
    body = {"model": "tensorrt_llm", "prompt": PROMPT, "max_tokens": 300, "stream": True}
    url = f"{served.info['openai']}/completions"

    def stream(_: int) -> str | None:
        with GenerateClient(served.info["grpc"]) as client:
            pieces = client.stream(PROMPT, timeout_s=TIMEOUT_S, **LONG)
            next(pieces)
            started.release()
            return list(pieces)[-1].finish_reason

    started = threading.Semaphore(0)
    with (
        ThreadPoolExecutor(4) as pool,
        requests.post(url, json=body, stream=True, timeout=TIMEOUT_S) as answer,
    ):
        reasons = [pool.submit(stream, number) for number in range(4)]
        lines = answer.iter_lines()
        next(lines)
        for _ in range(4):
            assert started.acquire(timeout=TIMEOUT_S)
        served.process.send_signal(signal.SIGTERM)
        assert b"\n".join(lines).decode().rstrip().endswith("data: [DONE]")
        assert [reason.result() for reason in reasons] == ["length"] * 4
    assert served.process.wait(TIMEOUT_S) == 0
    assert not list(Path("/dev/shm").glob(f"toolchain_{served.process.pid}_*"))
    assert not list(served.runtime_dir.glob("*.json"))
    assert session_members(served.server_pid) == []
