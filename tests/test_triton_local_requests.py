"""What model.py of target local makes of a request, and which outputs it gives; a script is the engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fake_triton import Request, TritonError
from tests.scripted_engine import loaded_model, ops


@pytest.fixture
def heard(tmp_path: Path) -> Path:
    return tmp_path / "heard.jsonl"


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    with loaded_model(tmp_path) as made:
        yield made


ASKED = {
    "sampling_param_logprobs": 0,
    "return_cumulative_logprob": True,
    "return_stop_reason": True,
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
    "sampling_param_return_perf_metrics": True,
}


@pytest.mark.parametrize("streaming", [True, False])
def test_outputs_that_were_asked_for(model: Any, heard: Path, streaming: bool) -> None:
    before = time.time_ns()
    request = Request(text_input="a", streaming=streaming, **ASKED)
    model.execute([request])
    *first, last = request.sender.collect()
    for response in first:
        assert set(response.outputs) == {"text_output", "logprobs"}
        assert [json.loads(item)["token_id"] for item in response.outputs["logprobs"]] == [0, 1]
    outputs = {name: array[0] for name, array in last.outputs.items() if name != "logprobs"}
    assert before < outputs.pop("arrival_time_ns") < time.time_ns()
    assert outputs == {
        "text_output": b"lo" if streaming else b"Hello",
        "finish_reason": b"stop",
        "stop_reason": b"!",
        "cumulative_logprob": -1.5,
        "num_input_tokens": 3,
        "num_output_tokens": 3,
        "first_scheduled_time_ns": 2_000,
        "first_token_time_ns": 3_000,
        "last_token_time_ns": 4_000,
    }
    entries = [json.loads(item) for item in last.outputs["logprobs"]]
    assert entries[0] == {"token_id": 0, "token": "t", "bytes": [116], "logprob": -0.5, "top": []}
    assert len(entries) == (1 if streaming else 3)
    (message,) = ops(heard, "generate")
    assert message["params"] == {"logprobs": 0}


def test_a_cumulative_log_probability_alone_brings_no_others(model: Any, heard: Path) -> None:
    request = Request(text_input="a", return_cumulative_logprob=True)
    model.execute([request])
    (response,) = request.sender.collect()
    assert set(response.outputs) == {"text_output", "cumulative_logprob"}
    assert ops(heard, "generate")[0]["params"] == {"logprobs": 0}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "text_input is missing"),
        ({"text_input": ["a", "b"]}, "text_input holds 2 strings"),
        ({"text_input": []}, "text_input is empty"),
        ({"text_input": b"\xff\xfe"}, "text_input is not UTF-8"),
        ({"text_input": 5}, "text_input is of type int64"),
        ({"text_input": "a" * 101}, "text_input has 101 bytes"),
        (
            {"text_input": "a", "sampling_param_temperature": float("nan")},
            "sampling_param_temperature is nan",
        ),
        ({"text_input": "a", "sampling_param_top_p": float("inf")}, "sampling_param_top_p is inf"),
        ({"text_input": "a", "sampling_param_top_k": [1, 2]}, "sampling_param_top_k has 2 elements"),
        (
            {"text_input": "a", "sampling_param_max_tokens": 1.5},
            "sampling_param_max_tokens is of type float64",
        ),
        ({"text_input": "a", "sampling_param_logprobs": "many"}, "sampling_param_logprobs is of type object"),
        ({"text_input": "a", "streaming": 1}, "streaming is of type int64"),
        ({"text_input": "a", "sampling_param_stop": []}, "sampling_param_stop is empty"),
        ({"text_input": "a", "sampling_param_stop": ["x", ""]}, "sampling_param_stop holds an empty string"),
        ({"text_input": "a", "sampling_param_best_of": 2}, "sampling_param_best_of is not supported"),
        ({"text_input": "a", "parameters": {"beam_width": 3}}, "unknown request fields: beam_width"),
        ({"text_input": "a", "parameters": {"timeout": "soon"}}, "timeout is 'soon'"),
        ({"stop": True}, "stop needs the id"),
    ],
)
def test_what_is_not_well_formed_is_refused_without_the_engine(
    model: Any, heard: Path, inputs: dict[str, Any], said: str
) -> None:
    request = Request(**inputs)
    model.execute([request])
    (response,) = request.sender.collect()
    assert response.error.code == TritonError.INVALID_ARG
    assert response.error.message.startswith("TC-5") and said in response.error.message
    assert not ops(heard, "generate")


def test_the_largest_seed_is_passed_on_exactly(model: Any, heard: Path) -> None:
    request = Request(text_input="a", sampling_param_seed=np.uint64(2**64 - 1))
    model.execute([request])
    request.sender.collect()
    assert ops(heard, "generate")[0]["params"] == {"seed": 2**64 - 1}


@pytest.mark.parametrize("given", [{"timeout_us": 250_000}, {"parameters": {"timeout": 250_000}}])
def test_the_timeout_of_a_request_goes_to_the_engine(model: Any, heard: Path, given: dict[str, Any]) -> None:
    request = Request(text_input="a", **given)
    model.execute([request])
    request.sender.collect()
    assert ops(heard, "generate")[0]["timeout_s"] == 0.25
