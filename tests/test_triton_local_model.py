"""What model.py of target local says to the engine process and to Triton, with a script as engine. The real engine on
the real server is in test_serve.py; here is what cannot be brought about there at will."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine_dirs import write_engine
from tests.fake_triton import Request, TritonError, TritonModelException, rendered_model
from toolchain.triton.render import render_repository

ENGINE = """
import json, sys
log = open(sys.argv[1], "a", buffering=1)
def say(**message):
    print(json.dumps(message), flush=True)
def token(number):
    return dict(token_id=number, token="t", bytes=[116], logprob=-0.5, top=[])
def chunk(number, text, count=1, **more):
    return dict(id=number, text=text, token_ids=[1] * count, logprobs=[token(i) for i in range(count)], **more)
def last(number, text, count=1, reason="stop"):
    times = [1_000, 2_000, 3_000, 4_000]
    return chunk(number, text, count, finish_reason=reason, prompt_tokens=3, stop_reason="!",
                 cumulative_logprob=-1.5, times_ns=times)
say(op="ready", model="m", max_batch_size=2, max_seq_len=8, max_prompt_bytes=100)
for line in sys.stdin:
    log.write(line)
    message = json.loads(line)
    number, text = message.get("id"), message.get("text_input")
    if message["op"] == "cancel":
        if text != "deaf":
            say(op="chunks", chunks=[last(number, "", 0, "cancelled")], running=0, waiting=0)
    elif message["op"] == "generate" and text == "refuse":
        say(op="error", id=number, kind="invalid_argument", message="TC-503: not this one")
    elif message["op"] == "generate" and text == "fail":
        say(op="chunks", chunks=[dict(op="error", id=number, kind="internal", message="TC-504: out of memory")])
    elif message["op"] == "generate" and message.get("stream") is False and text != "endless":
        say(op="chunks", chunks=[last(number, "Hello", 3)], running=0, waiting=0)
    elif message["op"] == "generate" and message.get("stream") is not False:
        say(op="chunks", chunks=[chunk(number, "Hel", 2)], running=1, waiting=0)
        if text not in ("endless", "deaf"):
            say(op="chunks", chunks=[last(number, "lo")], running=0, waiting=0)
"""


@pytest.fixture
def heard(tmp_path: Path) -> Path:
    return tmp_path / "heard.jsonl"


@pytest.fixture
def model(tmp_path: Path, heard: Path) -> Iterator[Any]:
    (tmp_path / "engine.py").write_text(ENGINE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "engine.py"} {heard} "$@"\n')
    python.chmod(0o755)
    engine = write_engine(tmp_path / "engine")
    repository = render_repository(engine, tmp_path / "repo", python=str(python))
    with rendered_model(repository / "tensorrt_llm" / "1") as module:
        model = module.TritonPythonModel()
        served = repository / "tensorrt_llm" / "1" / "served.json"
        served.write_text(json.dumps({**json.loads(served.read_text()), "cancellation_check_period_ms": 5}))
        model.initialize({})
        yield model
        model.finalize()


def ops(heard: Path, op: str) -> list[dict[str, Any]]:
    return [message for line in heard.read_text().splitlines() if (message := json.loads(line))["op"] == op]


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


def test_moved_engine_is_named(model: Any, tmp_path: Path) -> None:
    (tmp_path / "engine").rename(tmp_path / "elsewhere")
    with pytest.raises(TritonModelException, match=r"engine does not exist.*run `toolchain triton` again"):
        type(model)().initialize({})
