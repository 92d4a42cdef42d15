"""A rendered ``local`` repository on the real tritonserver, against the runtime in process.

Skipped only where no tritonserver is installed; `make tritonserver` installs one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM

from tests.engine_dirs import write_engine
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.types import SamplingParams
from toolchain.triton.client import GenerateClient, RequestFailed
from toolchain.triton.install import find_server
from toolchain.triton.render import render_repository
from toolchain.triton.server import TritonServer
from toolchain.triton.sessions import session_members

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`"),
]
PROMPT = "def main(argument):\n    return "
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32: with the random weights of a tiny model, bfloat16 rounds many best tokens to a tie, and who else
    is in the batch decides it."""
    root = tmp_path_factory.mktemp("engines")
    source = tiny("qwen3_moe")
    shutil.copytree(source, root / "checkpoint")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(root / "checkpoint")
    return write_engine(root / "tiny", checkpoint=root / "checkpoint")


@pytest.fixture(scope="module")
def repository(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_repository(engine, tmp_path_factory.mktemp("triton_repo") / "tiny")


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, ready_timeout_s=120) as running:
        yield running


@pytest.fixture(scope="module")
def in_process(engine: Path) -> Iterator[LocalEngine]:
    with LocalEngine.load(engine, device="cpu") as loaded:
        yield loaded


def ask(server: TritonServer, prompt: str = PROMPT, **inputs: Any) -> list[str]:
    """The pieces of one streamed answer over gRPC."""
    with GenerateClient(server.grpc_url) as client:
        return [piece.text for piece in client.stream(prompt, timeout_s=TIMEOUT_S, **inputs)]


def post(server: TritonServer, endpoint: str, **body: Any) -> requests.Response:
    url = f"{server.http_url}/v2/models/tensorrt_llm/{endpoint}"
    return requests.post(url, json=body, timeout=TIMEOUT_S)


def events(response: requests.Response) -> list[dict[str, Any]]:
    """The server-sent events of /generate_stream."""
    lines = response.content.decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def worker_pid(server: TritonServer) -> int:
    assert server.process is not None
    for pid in session_members(server.process.pid):
        if b"toolchain.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("no engine process")


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 24, "ignore_eos": True},
        {"max_tokens": 24, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7},
        {"max_tokens": 24, "stop": ["e", "j"]},
        {"max_tokens": 4, "exclude_input_from_output": False},
    ],
)
def test_the_same_text_as_in_process(
    server: TritonServer, in_process: LocalEngine, params: dict[str, Any]
) -> None:
    expected = in_process.generate(
        PROMPT, SamplingParams(**{**params, "stop": tuple(params.get("stop", ()))})
    )
    inputs = {f"sampling_param_{name}": value for name, value in params.items()}
    pieces = ask(server, **inputs)
    assert "".join(pieces) == expected.text
    if params["max_tokens"] > 4 and "stop" not in params:
        assert len(pieces) > 2
    answers = events(
        post(
            server, "generate_stream", text_input=PROMPT, streaming=True, return_finish_reason=True, **inputs
        )
    )
    assert "".join(answer["text_output"] for answer in answers) == expected.text
    assert answers[-1]["finish_reason"] == expected.finish_reason
    whole = post(server, "generate", text_input=PROMPT, **inputs)
    assert whole.json()["text_output"] == expected.text


def test_eight_streams_at_once_equal_their_single_answers(server: TritonServer) -> None:
    prompts = [f"{index} {PROMPT}" for index in range(8)]
    settings = {"sampling_param_max_tokens": 24, "sampling_param_ignore_eos": True}
    alone = ["".join(ask(server, prompt, **settings)) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: "".join(ask(server, prompt, **settings)), prompts))
    assert together == alone


def test_without_streaming_there_is_one_response(server: TritonServer) -> None:
    assert len(ask(server, streaming=False, sampling_param_max_tokens=16)) == 1


def test_performance_times_are_in_order(server: TritonServer) -> None:
    answer = post(server, "generate", text_input=PROMPT, sampling_param_return_perf_metrics=True).json()
    assert answer["arrival_time_ns"] < answer["first_token_time_ns"] <= answer["last_token_time_ns"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"sampling_param_max_tokens": 4}, "text_input is missing"),
        ({"text_input": ["a", "b"]}, "2 strings"),
        (
            {"text_input": "a", "max_tokens": 4, "image_url": "x"},
            "unknown request fields: image_url, max_tokens",
        ),
        ({"text_input": "a", "sampling_param_max_tokens": 0}, "max_tokens 0"),
        ({"text_input": "a", "sampling_param_top_p": 1.5}, "top_p 1.5"),
        ({"text_input": "a", "sampling_param_best_of": 2}, "best_of is not supported"),
        ({"text_input": "a", "sampling_param_logprobs": 21}, "logprobs 21"),
        (
            {"text_input": "a", "sampling_param_max_tokens": 512},
            "max_tokens 512 and the 1 tokens of the prompt",
        ),
        ({"text_input": "a" * 2000}, "max_seq_len"),
        ({"text_input": "a", "stop": True}, "needs the id"),
    ],
)
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_bad_requests_get_a_clean_error(
    server: TritonServer, endpoint: str, body: dict[str, Any], message: str
) -> None:
    response = post(server, endpoint, **body)
    assert response.status_code == 400
    assert message in response.text


def test_a_client_that_leaves_does_not_disturb_the_next(server: TritonServer) -> None:
    expected = ask(server, sampling_param_max_tokens=8)
    with GenerateClient(server.grpc_url) as client:
        settings = {"sampling_param_max_tokens": 400, "sampling_param_ignore_eos": True}
        stream = client.stream(PROMPT, timeout_s=TIMEOUT_S, **settings)
        next(stream)
        stream.close()
        pieces = list(client.stream(PROMPT, timeout_s=TIMEOUT_S, sampling_param_max_tokens=8))
    assert "".join(piece.text for piece in pieces) == "".join(expected)


def test_stop_input_ends_the_request_of_that_id(server: TritonServer) -> None:
    with GenerateClient(server.grpc_url) as client:
        settings = {"sampling_param_max_tokens": 400, "sampling_param_ignore_eos": True}
        stream = client.stream(PROMPT, timeout_s=TIMEOUT_S, request_id="mine", **settings)
        next(stream)
        assert post(server, "generate", id="mine", text_input="", stop=True).status_code == 200
        with pytest.raises(RequestFailed, match="cancelled"):
            list(stream)


def test_killed_engine_process_fails_its_requests_and_comes_back(server: TritonServer) -> None:
    settings = {"sampling_param_max_tokens": 400, "sampling_param_ignore_eos": True}
    expected = ask(server, sampling_param_max_tokens=8)
    victim = worker_pid(server)
    with GenerateClient(server.grpc_url) as client:
        stream = client.stream(PROMPT, timeout_s=TIMEOUT_S, **settings)
        next(stream)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(RequestFailed, match=r"ended with status -9 while it worked on this request"):
            list(stream)
        with pytest.raises(RequestFailed, match="being restarted"):
            list(client.stream(PROMPT, timeout_s=TIMEOUT_S))
    wait_until(lambda: answers(server), "the engine process was restarted")
    assert worker_pid(server) != victim
    assert "".join(ask(server, sampling_param_max_tokens=8)) == "".join(expected)


def answers(server: TritonServer) -> bool:
    try:
        server.probe(timeout_s=TIMEOUT_S)
    except RequestFailed:
        return False
    return True


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {TIMEOUT_S} s: {what}")
        time.sleep(0.1)


SERVE = """
import sys
from pathlib import Path
from toolchain.serve.run import Ports, ServeOptions, serve_engine
def ready(serving):
    server = serving.server
    print(server.process.pid, server.grpc_url, server._shm_prefix, flush=True)
ports = Ports(http=0, grpc=0, metrics=0, status=0)
engine, repository, log = map(Path, sys.argv[1:])
sys.exit(serve_engine(engine, repository, ports, ready, options=ServeOptions(log_file=log)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_stops_on_a_signal_and_leaves_nothing_behind(
    engine: Path, repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", SERVE, str(engine), str(repository), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, url, shm_prefix = process.stdout.readline().split()
        assert len(session_members(int(pid))) == 3  # tritonserver, stub, engine process
        assert list(Path("/dev/shm").glob(f"{shm_prefix}*"))
        with GenerateClient(url) as client:
            stream = client.stream(PROMPT, timeout_s=TIMEOUT_S, sampling_param_max_tokens=200)
            next(stream)
            process.send_signal(number)
            assert list(stream)[-1].finish_reason in ("length", "stop")  # running requests may end
        assert process.wait(60) == 0
    assert session_members(int(pid)) == []
    assert not list(Path("/dev/shm").glob(f"{shm_prefix}*"))


def test_engine_that_cannot_load_is_named_with_its_reason(engine: Path, tmp_path: Path) -> None:
    broken = write_engine(tmp_path / "broken")
    repository = render_repository(broken, tmp_path / "repo")
    with (
        pytest.raises(ToolchainError, match=r"tritonserver ended with status 1") as caught,
        TritonServer(repository),
    ):
        pass
    assert "did not start" in str(caught.value) and str(broken) in str(caught.value)


def test_port_in_use_is_refused_before_anything_starts(server: TritonServer, repository: Path) -> None:
    with pytest.raises(UsageError, match=f"port {server.http_port} "):
        TritonServer(repository, http_port=server.http_port).start()


STAND_IN = """
import asyncio, types
class SamplingParams:
    def __init__(self, max_tokens=3, **given):
        self.max_tokens = max_tokens
class Result:
    def __init__(self, prompt, count):
        self.prompt, self.count = prompt, count
    async def __aiter__(self):
        for index in range(self.count):
            await asyncio.sleep(0.01)
            out = types.SimpleNamespace(text=self.prompt * (index + 1), finish_reason="length")
            yield types.SimpleNamespace(outputs=[out], finished=index == self.count - 1)
    def abort(self):
        self.count = 0
class LLM:
    def __init__(self, model, **arguments):
        self.model = model
    def generate_async(self, prompt, params, streaming):
        return Result(prompt, params.max_tokens)
    def shutdown(self):
        pass
"""


def test_llmapi_layout_loads_and_streams_with_a_stand_in_for_the_llm(tmp_path: Path) -> None:
    """On the real server: auto-completion from model.yaml, imports of the version directory, decoupled answers. Not
    TensorRT-LLM itself."""
    import yaml

    repository = render_repository(write_engine(tmp_path / "e", target="trtllm"), tmp_path / "r")
    version = repository / "tensorrt_llm" / "1"
    (version / "tensorrt_llm.py").write_text(STAND_IN)
    shutil.copytree(
        Path(yaml.__file__).parent, version / "yaml", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    with TritonServer(repository, ready_timeout_s=120) as running:
        config = requests.get(f"{running.http_url}/v2/models/tensorrt_llm/config", timeout=TIMEOUT_S).json()
        assert config["max_batch_size"] == 0
        assert config["model_transaction_policy"] == {"decoupled": True}
        assert ask(running, "ab") == ["ab", "ab", "ab"]
        assert post(running, "generate", text_input="ab").json()["text_output"] == "ababab"
        assert post(running, "generate", max_tokens=3).status_code == 400
