"""What the local model adds to a request, on the real tritonserver: its outputs, limits, timeouts and metrics.

Skipped only where no tritonserver is installed; `make tritonserver` installs one.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.engine_dirs import write_engine
from tests.worker_pipe import copy_in_float32
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.types import SamplingParams
from toolchain.triton.client import GenerateClient, RequestFailed
from toolchain.triton.install import find_server
from toolchain.triton.render import render_repository
from toolchain.triton.served import QueueLimits
from toolchain.triton.server import TritonServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`"),
]
PROMPT = "def main(argument):\n    return "
TIMEOUT_S = 60.0
STREAMS = 200


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engines")
    return write_engine(root / "tiny", checkpoint=copy_in_float32(tiny("qwen3_moe"), root / "checkpoint"))


@pytest.fixture(scope="module")
def in_process(engine: Path) -> Iterator[LocalEngine]:
    with LocalEngine.load(engine, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = render_repository(
        engine, tmp_path_factory.mktemp("triton_repo") / "tiny", queue_limits=QueueLimits(max_waiting=STREAMS)
    )
    with TritonServer(repository, ready_timeout_s=120) as running:
        yield running


def post(server: TritonServer, **body: Any) -> requests.Response:
    url = f"{server.http_url}/v2/models/tensorrt_llm/generate"
    return requests.post(url, json=body, timeout=TIMEOUT_S)


def stream(server: TritonServer, prompt: str, **inputs: Any) -> str:
    with GenerateClient(server.grpc_url) as client:
        return "".join(piece.text for piece in client.stream(prompt, timeout_s=TIMEOUT_S, **inputs))


def test_many_streams_at_once_lose_and_mix_up_nothing(server: TritonServer, in_process: LocalEngine) -> None:
    """Far more than rows: most of them wait. Each equals what its prompt gives alone."""
    lengths = [4 + index % 13 for index in range(STREAMS)]
    prompts = [f"{index} " + "ab" * (index % 7) for index in range(STREAMS)]
    expected = [
        in_process.generate(prompt, SamplingParams(max_tokens=length, ignore_eos=True)).text
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    begin = threading.Barrier(STREAMS)

    def ask(index: int) -> str:
        begin.wait(TIMEOUT_S)
        settings = {"sampling_param_max_tokens": lengths[index], "sampling_param_ignore_eos": True}
        return stream(server, prompts[index], **settings)

    with ThreadPoolExecutor(STREAMS) as pool:
        assert list(pool.map(ask, range(STREAMS))) == expected


def test_penalties_and_special_tokens_give_the_text_of_the_engine(
    server: TritonServer, in_process: LocalEngine
) -> None:
    params = {
        "max_tokens": 24, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": -0.5,
        "add_special_tokens": False,
    }  # fmt: skip
    expected = in_process.generate(PROMPT, SamplingParams(**params))
    assert expected.text != in_process.generate(PROMPT, SamplingParams(max_tokens=24)).text
    assert (
        stream(server, PROMPT, **{f"sampling_param_{name}": params[name] for name in params}) == expected.text
    )


def test_outputs_of_the_model(server: TritonServer, in_process: LocalEngine) -> None:
    expected = in_process.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True, logprobs=2))
    answer = post(
        server, text_input=PROMPT, sampling_param_max_tokens=5, sampling_param_ignore_eos=True,
        sampling_param_logprobs=2, return_cumulative_logprob=True, return_num_input_tokens=True,
        return_num_output_tokens=True, return_stop_reason=True, sampling_param_return_perf_metrics=True,
    ).json()  # fmt: skip
    entries = [json.loads(item) for item in answer["logprobs"]]
    assert [entry["token_id"] for entry in entries] == list(expected.token_ids)
    assert [entry["logprob"] for entry in entries] == pytest.approx(
        [item.logprob for item in expected.logprobs], abs=1e-4
    )
    assert [len(entry["top"]) for entry in entries] == [2] * 5
    assert answer["cumulative_logprob"] == pytest.approx(expected.cumulative_logprob, abs=1e-3)
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (expected.prompt_tokens, 5)
    assert answer["stop_reason"] == ""
    names = ("arrival", "first_scheduled", "first_token", "last_token")
    times = [answer[f"{name}_time_ns"] for name in names]
    assert times == sorted(times)


def test_a_stop_string_is_named(server: TritonServer, in_process: LocalEngine) -> None:
    stop = in_process.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True)).text[6:9]
    answer = post(
        server, text_input=PROMPT, sampling_param_max_tokens=24, sampling_param_stop=["never", stop],
        return_stop_reason=True, return_finish_reason=True,
    ).json()  # fmt: skip
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)


def test_the_timeout_of_a_request_is_kept(server: TritonServer) -> None:
    """Over HTTP it is a field of the JSON, over gRPC of the request."""
    settings = {"sampling_param_max_tokens": 400, "sampling_param_ignore_eos": True}
    response = post(server, text_input=PROMPT, timeout=20_000, **settings)
    assert response.status_code >= 400
    assert "TC-513: the request did not end within its timeout of 0.02 s" in response.text


def test_ten_megabytes_are_refused_while_others_go_on(server: TritonServer) -> None:
    settings = {"sampling_param_max_tokens": 8, "sampling_param_ignore_eos": True}
    expected = stream(server, PROMPT, **settings)
    with ThreadPoolExecutor(5) as pool:
        large = [pool.submit(post, server, text_input="x" * 10_000_000) for _ in range(2)]
        others = [pool.submit(stream, server, PROMPT, **settings) for _ in range(3)]
        for refused in large:
            assert refused.result().status_code == 400
            assert "TC-503: text_input has 10000000 bytes" in refused.result().text
        assert [other.result() for other in others] == [expected] * 3


def metrics(server: TritonServer) -> dict[str, float]:
    text = requests.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=TIMEOUT_S).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("toolchain_")]
    return {name: float(value) for name, value in lines}


def total(found: dict[str, float], name: str, *labels: str) -> float:
    return sum(
        value for key, value in found.items() if key.startswith(f"{name}{{") and all(x in key for x in labels)
    )


def test_requests_show_in_the_metrics(server: TritonServer) -> None:
    time.sleep(2.5)  # they are told once a second
    before = metrics(server)
    stream(server, PROMPT, sampling_param_max_tokens=10, sampling_param_ignore_eos=True)
    post(server, text_input=PROMPT, sampling_param_top_p=7.0)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        after = metrics(server)
        grown = {
            name: total(after, name, *labels) - total(before, name, *labels)
            for name, *labels in (
                ("toolchain_requests_total", 'outcome="length"'),
                ("toolchain_generated_tokens_total",),
                ("toolchain_prompt_tokens_total",),
                ("toolchain_time_to_first_token_seconds_count",),
                ("toolchain_queue_seconds_count",),
                ("toolchain_inter_token_latency_seconds_bucket", 'le="+Inf"'),
            )
        }
        refused = total(after, "toolchain_requests_total", "invalid_argument")
        if all(grown.values()) and refused > total(before, "toolchain_requests_total", "invalid_argument"):
            break
        assert time.monotonic() < deadline, grown
        time.sleep(0.2)
    *counts, latencies = grown.values()
    assert counts == [1, 10, len(PROMPT), 1, 1]
    # Tokens that had to wait for the rest of their character came together with it.
    assert 1 <= latencies <= 9
    assert total(after, "toolchain_requests_running") == total(after, "toolchain_requests_waiting") == 0


def test_a_full_queue_is_an_unavailable_service(engine: Path, tmp_path: Path) -> None:
    """One row, nobody waits."""
    one_row = tmp_path / "one_row"
    shutil.copytree(engine, one_row, symlinks=True)
    manifest = json.loads((one_row / "engine.json").read_text())
    manifest["limits"]["max_batch_size"] = 1
    (one_row / "engine.json").write_text(json.dumps(manifest))
    repository = render_repository(one_row, tmp_path / "repo", queue_limits=QueueLimits(max_waiting=0))
    with (
        TritonServer(repository, ready_timeout_s=120) as running,
        GenerateClient(running.grpc_url) as client,
    ):
        settings = {"sampling_param_max_tokens": 440, "sampling_param_ignore_eos": True}
        answer = client.stream(PROMPT, timeout_s=TIMEOUT_S, **settings)
        next(answer)
        with pytest.raises(RequestFailed, match="TC-505: 0 requests are waiting already"):
            stream(running, PROMPT)
        assert list(answer)[-1].finish_reason == "length"
