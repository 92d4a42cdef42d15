"""What model.py of target trtllm asks of the LLM API and what it emits. The LLM is a stand-in: whether the real
TensorRT-LLM loads the engine needs a machine that has it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.engine_dirs import write_engine
from tests.fake_triton import Request, TritonError, TritonModelException, rendered_model
from toolchain.triton.render import render_repository

PIECES = ("Hello", "Hello, wor", "Hello, world")


class FakeResult:
    """``text`` is cumulative, as in TensorRT-LLM's CompletionOutput."""

    def __init__(self, params: Any) -> None:
        self.params, self.aborted = params, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for index, text in enumerate(PIECES):
            while self.params.max_tokens == 999 and not self.aborted:
                await asyncio.sleep(0.005)
            last = index == len(PIECES) - 1
            completion = SimpleNamespace(
                text=text,
                finish_reason="stop",
                stop_reason="END",
                cumulative_logprob=-1.5,
                request_perf_metrics=None,
                token_ids=list(range(2 * index + 2)),
                logprobs=[logprobs_of(token) for token in range(2 * index + 2)],
            )
            if self.params.return_perf_metrics:
                completion.request_perf_metrics = perf_metrics()
            if self.params.max_tokens == 13:
                raise RuntimeError("CUDA out of memory")
            yield SimpleNamespace(outputs=[completion], finished=last, prompt_token_ids=[7, 8, 9])

    def abort(self) -> None:
        self.aborted = True


def logprobs_of(token: int) -> dict[int, Any]:
    """The two best tokens, and the chosen one behind them."""
    values = {100: -0.25, 200: -1.0, token: -3.0}
    return {
        key: SimpleNamespace(logprob=value, rank=rank) for rank, (key, value) in enumerate(values.items(), 1)
    }


def perf_metrics() -> Any:
    return SimpleNamespace(
        kv_cache_metrics=SimpleNamespace(
            num_reused_blocks=1, num_missed_blocks=2, num_new_allocated_blocks=3, num_total_allocated_blocks=4,
            kv_cache_hit_rate=0.5,
        ),
        timing_metrics=SimpleNamespace(
            arrival_time=timedelta(seconds=1), first_scheduled_time=timedelta(seconds=1, microseconds=5),
            first_token_time=timedelta(seconds=2), last_token_time=timedelta(days=1),
        ),
        speculative_decoding=SimpleNamespace(
            acceptance_rate=0.25, total_accepted_draft_tokens=5, total_draft_tokens=20
        ),
    )  # fmt: skip


class FakeSamplingParams:
    def __init__(self, **given: Any) -> None:
        self.given = given
        self.max_tokens = given.get("max_tokens", 32)
        self.return_perf_metrics = given.get("return_perf_metrics", False)
        if self.max_tokens < 1:
            raise ValueError("max_tokens must be positive")


class FakeLLM:
    made: Any = None

    def __init__(self, **arguments: Any) -> None:
        type(self).made = self
        self.arguments, self.calls, self.stopped = arguments, [], False
        self.visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.tokenizer = SimpleNamespace(decode=lambda ids: "\ufffd" if ids == [200] else f"<{ids[0]}>")

    def generate_async(self, prompt: str, params: FakeSamplingParams, streaming: bool) -> FakeResult:
        asyncio.get_running_loop()  # the real one binds its queue to the running loop
        result = FakeResult(params)
        self.calls.append((prompt, params.given, streaming, result))
        return result

    def shutdown(self) -> None:
        self.stopped = True


@pytest.fixture
def version_dir(tmp_path: Path) -> Path:
    engine = write_engine(tmp_path / "engine", target="trtllm")
    return render_repository(engine, tmp_path / "repo") / "tensorrt_llm" / "1"


@pytest.fixture
def module(version_dir: Path) -> Iterator[Any]:
    tensorrt_llm = ModuleType("tensorrt_llm")
    tensorrt_llm.__dict__.update(LLM=FakeLLM, SamplingParams=FakeSamplingParams)
    with rendered_model(version_dir, tensorrt_llm=tensorrt_llm) as found:
        yield found


@pytest.fixture
def model(module: Any) -> Iterator[Any]:
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": {}, "instance_group": [{"count": 1}]})})
    yield model
    model.finalize()
    assert FakeLLM.made.stopped


def ask(model: Any, **inputs: Any) -> list[Any]:
    request = Request(**inputs)
    assert model.execute([request]) is None
    return request.sender.collect()


def test_llm_gets_the_arguments_of_model_yaml(model: Any, version_dir: Path) -> None:
    assert FakeLLM.made.arguments == {
        "backend": "pytorch",
        "tensor_parallel_size": 2,
        "kv_cache_config": {"dtype": "fp8"},
        "model": str(version_dir.parents[2] / "engine" / "checkpoint"),
    }


def test_auto_complete_takes_batch_size_and_policy_from_model_yaml(module: Any) -> None:
    calls: dict[str, Any] = {}
    config = SimpleNamespace(
        set_max_batch_size=lambda size: calls.update(size=size),
        set_model_transaction_policy=lambda policy: calls.update(policy),
    )
    assert module.TritonPythonModel.auto_complete_config(config) is config
    assert calls == {"size": 0, "decoupled": True}


def test_streaming_sends_each_new_piece(model: Any) -> None:
    responses = ask(
        model, text_input="Hi", streaming=True, return_finish_reason=True, return_stop_reason=True
    )
    assert [response.text for response in responses] == ["Hello", ", wor", "ld"]
    assert [list(response.outputs) for response in responses[:-1]] == [["text_output"]] * 2
    assert responses[-1].outputs["finish_reason"][0] == b"stop"
    assert responses[-1].outputs["stop_reason"][0] == b"END"


def test_without_streaming_one_response(model: Any) -> None:
    (response,) = ask(model, text_input="Hi", return_cumulative_logprob=True)
    assert response.text == "Hello, world"
    assert response.outputs["cumulative_logprob"][0] == -1.5


def test_sampling_parameters_reach_the_llm(model: Any) -> None:
    ask(model, text_input="Hi", sampling_param_max_tokens=7, sampling_param_temperature=0.5, sampling_param_seed=3,
        sampling_param_stop=["a", "ß"], sampling_param_ignore_eos=True)  # fmt: skip
    prompt, params, streaming, _ = FakeLLM.made.calls[-1]
    assert (prompt, streaming) == ("Hi", False)
    assert params == {"max_tokens": 7, "temperature": 0.5, "seed": 3, "stop": ["a", "ß"], "ignore_eos": True}


def test_inputs_that_the_llm_calls_the_same_are_passed_on(model: Any) -> None:
    given = {"repetition_penalty": 1.5, "add_special_tokens": False, "logprobs": 3, "frequency_penalty": 0.5}
    ask(model, text_input="Hi", **{f"sampling_param_{name}": value for name, value in given.items()})
    assert FakeLLM.made.calls[-1][1] == given


def test_log_probabilities_come_with_their_pieces(model: Any) -> None:
    responses = ask(model, text_input="Hi", streaming=True, sampling_param_logprobs=2)
    entries = [[json.loads(item) for item in response.outputs["logprobs"]] for response in responses]
    assert [[entry["token_id"] for entry in part] for part in entries] == [[0, 1], [2, 3], [4, 5]]
    assert entries[0][1] == {
        "token_id": 1,
        "token": "<1>",
        "bytes": [60, 49, 62],
        "logprob": -3.0,
        "top": [
            {"token_id": 100, "token": "<100>", "bytes": list(b"<100>"), "logprob": -0.25},
            {"token_id": 200, "token": "\ufffd", "bytes": None, "logprob": -1.0},
        ],
    }
    (whole,) = ask(model, text_input="Hi", sampling_param_logprobs=0)
    assert [json.loads(item)["top"] for item in whole.outputs["logprobs"]] == [[]] * 6


def test_token_counts(model: Any) -> None:
    (response,) = ask(model, text_input="Hi", return_num_input_tokens=True, return_num_output_tokens=True)
    assert (response.outputs["num_input_tokens"][0], response.outputs["num_output_tokens"][0]) == (3, 6)


def test_a_cumulative_log_probability_makes_the_llm_compute_some(model: Any) -> None:
    ask(model, text_input="Hi", return_cumulative_logprob=True)
    assert FakeLLM.made.calls[-1][1] == {"logprobs": 1}


def test_perf_metrics(model: Any) -> None:
    (response,) = ask(model, text_input="Hi", sampling_param_return_perf_metrics=True)
    values = {name: array[0] for name, array in response.outputs.items() if name != "text_output"}
    assert values["arrival_time_ns"] == 1_000_000_000
    assert values["first_scheduled_time_ns"] == 1_000_005_000
    assert values["last_token_time_ns"] == 86_400 * 10**9
    assert (values["kv_cache_hit_rate"], values["acceptance_rate"], values["total_draft_tokens"]) == (
        0.5,
        0.25,
        20,
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"sampling_param_max_tokens": 5}, "text_input is missing"),
        ({"text_input": ["a", "b"]}, "2 strings"),
        ({"text_input": b"\xff"}, "not UTF-8"),
        ({"text_input": "a", "sampling_param_top_k": [1, 2]}, "2 elements"),
        ({"text_input": "a", "sampling_param_temperature": float("nan")}, "finite"),
        ({"text_input": "a", "sampling_param_max_tokens": 0}, "must be positive"),
        ({"text_input": "a", "parameters": {"max_tokens": 5}}, "unknown request fields: max_tokens"),
        ({"stop": True}, "needs the id"),
    ],
)
def test_bad_requests(model: Any, inputs: dict[str, Any], message: str) -> None:
    (response,) = ask(model, **inputs)
    assert response.error.code == TritonError.INVALID_ARG
    assert message in response.error.message


def test_failure_of_the_llm_reaches_the_client(model: Any) -> None:
    (response,) = ask(model, text_input="Hi", sampling_param_max_tokens=13)
    assert response.error.code == TritonError.INTERNAL and "out of memory" in response.error.message


@pytest.mark.parametrize("way", ["client gone", "stop input"])
def test_cancellation_aborts_the_generation(model: Any, way: str) -> None:
    request = Request(text_input="Hi", sampling_param_max_tokens=999, request_id="r1", streaming=True)
    model.execute([request])
    while not FakeLLM.made.calls:
        time.sleep(0.005)
    if way == "client gone":
        request.sender.cancelled = True
    else:
        ask(model, stop=True, request_id="r1")
    (response,) = request.sender.collect()
    assert response.error.code == TritonError.CANCELLED
    assert FakeLLM.made.calls[-1][3].aborted


def test_each_instance_sees_its_own_gpus(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("TRTLLM_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    config = {"parameters": {"gpu_device_ids": {"string_value": "0,1;2,3"}}, "instance_group": [{"count": 2}]}
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_instance_name": "tensorrt_llm_0_1"})
    model.finalize()
    assert FakeLLM.made.visible == "2,3" and os.environ.pop("CUDA_VISIBLE_DEVICES") == "2,3"
    assert FakeLLM.made.arguments["gpus_per_node"] == 2
    assert "OMPI_COMM_WORLD_RANK" not in os.environ


def test_moved_checkpoint_is_named(module: Any, version_dir: Path) -> None:
    (version_dir.parents[2] / "engine").rename(version_dir.parents[2] / "elsewhere")
    with pytest.raises(TritonModelException, match=r"does not exist.*run `toolchain triton` again"):
        module.TritonPythonModel().initialize({"model_config": "{}"})
