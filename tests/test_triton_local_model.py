"""What model.py of target local says to the engine process and to Triton, with a script as engine. The real engine on
the real server is in test_serve.py; here is what cannot be brought about there at will."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_triton import MetricFamily, Request, TritonError, TritonModelException
from tests.scripted_engine import loaded_model, ops


@pytest.fixture
def heard(tmp_path: Path) -> Path:
    return tmp_path / "heard.jsonl"


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    with loaded_model(tmp_path) as made:
        yield made


def test_only_given_parameters_are_passed_on(model: Any, heard: Path) -> None:
    request = Request(
        text_input="ß", sampling_param_max_tokens=3, sampling_param_stop=["x"], sampling_param_best_of=1
    )
    assert model.execute([request]) is None
    assert [response.text for response in request.sender.collect()] == ["Hello"]
    (message,) = ops(heard, "generate")
    assert message["text_input"] == "ß"
    assert message["params"] == {"max_tokens": 3, "stop": ["x"]}
    assert message["stream"] is False


def test_streaming_sends_each_piece(model: Any) -> None:
    request = Request(text_input="a", streaming=True, return_finish_reason=True)
    model.execute([request])
    responses = request.sender.collect()
    assert [response.text for response in responses] == ["Hel", "lo"]
    assert responses[-1].outputs["finish_reason"][0] == b"stop"


def test_all_requests_of_a_call_reach_the_engine_before_the_first_has_ended(model: Any) -> None:
    endless, short = Request(text_input="endless", streaming=True), Request(text_input="a")
    model.execute([endless, short])
    assert [response.text for response in short.sender.collect()] == ["Hello"]
    assert endless.sender.sent.get(timeout=10)[1] == 0


def test_a_client_that_has_gone_is_cancelled_in_the_engine(model: Any, heard: Path) -> None:
    request = Request(text_input="endless", streaming=True)
    model.execute([request])
    request.sender.cancelled = True
    assert request.sender.collect()[-1].error.code == TritonError.CANCELLED
    assert len(ops(heard, "cancel")) == 1


def test_errors_of_the_engine_keep_their_kind_and_come_before_the_final_flag(model: Any) -> None:
    request = Request(text_input="refuse")
    model.execute([request])
    response, flags = request.sender.sent.get(timeout=10)
    assert (response.error.code, response.error.message, flags) == (
        TritonError.INVALID_ARG,
        "TC-503: not this one",
        0,
    )
    assert request.sender.sent.get(timeout=10) == (None, 1)


def test_unloading_answers_what_is_open(model: Any) -> None:
    request = Request(text_input="endless")
    model.execute([request])
    time.sleep(0.05)
    model.finalize()
    (response,) = request.sender.collect()
    assert response.error.code == TritonError.UNAVAILABLE


def test_limits_of_served_json_are_options_of_the_engine_process(
    model: Any, heard: Path, tmp_path: Path
) -> None:
    (message,) = ops(heard, "started")
    worker = ["-m", "toolchain.runtime.worker", str(tmp_path / "engine")]
    assert message["arguments"] == [*worker, "--max-waiting", "7", "--max-queue-s", "2.5"]


def test_an_error_within_a_round_ends_its_request(model: Any) -> None:
    failing, fine = Request(text_input="fail"), Request(text_input="a")
    model.execute([failing, fine])
    (response,) = failing.sender.collect()
    assert (response.error.code, response.error.message) == (
        TritonError.INTERNAL,
        "TC-504: out of memory",
    )
    assert fine.sender.collect()[0].text == "Hello"


def test_a_timeout_is_kept_also_when_the_engine_does_not(
    model: Any, heard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["model"], "OVERDUE_S", 0.05)
    request = Request(text_input="deaf", timeout_us=50_000)
    model.execute([request])
    (response,) = request.sender.collect()
    assert response.error.code == TritonError.CANCELLED
    assert response.error.message == "TC-513: the request did not end within its timeout of 0.05 s"
    assert len(ops(heard, "cancel")) == 1


def test_stopping_an_unknown_request_is_answered_without_the_engine(model: Any, heard: Path) -> None:
    request = Request(request_id="nobody", stop=True)
    model.execute([request])
    assert [response.text for response in request.sender.collect()] == [""]
    assert [message["op"] for message in map(json.loads, heard.read_text().splitlines())] == ["started"]


def test_many_streams_at_once_get_each_their_own_pieces_in_order(model: Any) -> None:
    requests = [Request(text_input=f"request {index}", streaming=True) for index in range(200)]
    model.execute(requests)
    for request in requests:
        assert [response.text for response in request.sender.collect()] == ["Hel", "lo"]


def value(name: str, **labels: str) -> Any:
    found = MetricFamily.made[name].metrics.get(
        (("model", "tensorrt_llm"), ("version", "1"), *labels.items())
    )
    return None if found is None else found.value


def test_metrics_count_what_happened(model: Any) -> None:
    requests = [
        Request(text_input="a", streaming=True),
        Request(text_input="a"),
        Request(text_input="refuse"),
    ]
    endless = Request(text_input="endless", streaming=True)
    model.execute([*requests, Request(), endless])
    for request in requests:
        request.sender.collect()
    deadline = time.monotonic() + 10
    while value("toolchain_requests_total", outcome="invalid_argument") != 2 or not value(
        "toolchain_time_to_first_token_seconds"
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert value("toolchain_requests_total", outcome="stop") == 2
    assert value("toolchain_prompt_tokens_total") == 6
    assert value("toolchain_generated_tokens_total") == 6
    assert value("toolchain_requests_running") == 1 and value("toolchain_requests_waiting") == 0
    assert len(value("toolchain_time_to_first_token_seconds")) == 2
    # The streamed answer has 2 tokens, then 1 later; the other 3 tokens within 1 us.
    assert value("toolchain_inter_token_latency_seconds_count") == 3
    assert value("toolchain_inter_token_latency_seconds_bucket", le="+Inf") == 3
    assert value("toolchain_inter_token_latency_seconds_bucket", le="0.001") >= 2
    limits = [
        labels[2][1] for labels in MetricFamily.made["toolchain_inter_token_latency_seconds_bucket"].metrics
    ]
    counts = [value("toolchain_inter_token_latency_seconds_bucket", le=limit) for limit in limits]
    assert counts == sorted(counts)


def test_moved_engine_is_named(model: Any, tmp_path: Path) -> None:
    (tmp_path / "engine").rename(tmp_path / "elsewhere")
    with pytest.raises(TritonModelException, match=r"engine does not exist.*run `toolchain triton` again"):
        type(model)().initialize({})


@pytest.mark.parametrize(
    ("lists", "instance", "expected"),
    [("2;3", "tensorrt_llm_0_1", "3"), ("0,1;2, 3", "m_0_1", "2,3"), ("", "m_0_1", None)],
)
def test_instances_see_their_own_gpus(
    model: Any, lists: str, instance: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    parameters = {"gpu_device_ids": {"string_value": lists}} if lists else {}
    args = {"model_config": json.dumps({"parameters": parameters}), "model_instance_name": instance}
    sys.modules["instance_gpus"].choose_gpus(args)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if lists:
        with pytest.raises(TritonModelException, match="no entry for instance 2"):
            sys.modules["instance_gpus"].choose_gpus({**args, "model_instance_name": "m_0_2"})
