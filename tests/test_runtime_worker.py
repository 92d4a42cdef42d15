"""The worker process over its pipes, as the Triton stub uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker_pipe import Pipe, copy_in_float32, entries_of
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.types import SamplingParams

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_in_float32(tiny("qwen3_moe"), tmp_path_factory.mktemp("worker") / "model")


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[Pipe]:
    pipe = Pipe(str(model), "--device", "cpu", "--max-batch-size", "2")
    ready = {"op": "ready", "model": "model", "max_batch_size": 2, "max_seq_len": 512}
    assert pipe.receive() == {**ready, "max_prompt_bytes": 512 * 16}
    yield pipe
    pipe.process.kill()
    pipe.process.communicate()


def test_answers_equal_the_engine_in_process(worker: Pipe, model: Path) -> None:
    params = {
        "max_tokens": 12,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.95,
        "seed": 5,
        "stop": ["\x00\x00"],
    }
    for identity, text in enumerate(("abc", "héllo 漢", "z")):
        worker.send({"op": "generate", "id": identity, "text_input": text, "params": params})
    answers: dict[int, str] = {0: "", 1: "", 2: ""}
    ended: dict[int, dict[str, Any]] = {}
    while len(ended) < 3:
        message = worker.receive()
        answers[message["id"]] += message["text"]
        if "finish_reason" in message:
            ended[message["id"]] = message
    with LocalEngine.load(model, device="cpu") as engine:
        for identity, text in enumerate(("abc", "héllo 漢", "z")):
            expected = engine.generate(text, SamplingParams(**{**params, "stop": ("\x00\x00",)}))
            assert answers[identity] == expected.text
            assert ended[identity]["finish_reason"] == expected.finish_reason
            assert ended[identity]["prompt_tokens"] == expected.prompt_tokens


def test_cancel(worker: Pipe) -> None:
    worker.send({"op": "cancel", "id": 12345})
    worker.send(
        {"op": "generate", "id": 7, "text_input": "abc", "params": {"max_tokens": 480, "ignore_eos": True}}
    )
    assert worker.receive()["id"] == 7
    worker.send({"op": "cancel", "id": 7})
    assert worker.answer(7)[-1]["finish_reason"] == "cancelled"


def test_the_chunks_of_one_round_come_in_one_line(model: Path) -> None:
    """And say what runs and what waits."""
    pipe = Pipe(str(model), "--device", "cpu", "--max-batch-size", "2")
    assert pipe.receive()["op"] == "ready"
    # Long enough that all four have been read before the first one ends, however busy the machine is.
    params = {"max_tokens": 300, "ignore_eos": True}
    for identity in range(3):
        pipe.send({"op": "generate", "id": identity, "text_input": "abc", "params": params})
    pipe.send({"op": "generate", "id": 9, "text_input": "abc", "params": {**params, "max_tokens": 1}})
    lines: list[dict[str, Any]] = []
    while sum("finish_reason" in entry for line in lines for entry in line["chunks"]) < 4:
        assert pipe.process.stdout is not None
        lines.append(json.loads(pipe.process.stdout.readline()))
    pipe.process.kill()
    pipe.process.communicate()
    entries = [entry for line in lines for entry in line["chunks"]]
    assert sum(len(entry["token_ids"]) for entry in entries) == 3 * 300 + 1
    # Two rows: a step in which both have text is one line.
    assert max(len(line["chunks"]) for line in lines) >= 2
    assert len(lines) < len(entries)
    assert (2, 2) in {(line["running"], line["waiting"]) for line in lines}
    assert (lines[-1]["running"], lines[-1]["waiting"]) == (0, 0)
    assert max(line["running"] for line in lines) == 2


def test_log_probabilities_and_the_end_of_an_answer(worker: Pipe, model: Path) -> None:
    params = {"max_tokens": 6, "logprobs": 2, "ignore_eos": True, "repetition_penalty": 1.3}
    worker.send({"op": "generate", "id": 31, "text_input": "né", "params": params})
    entries = worker.answer(31)
    with LocalEngine.load(model, device="cpu") as engine:
        expected = engine.generate("né", SamplingParams(**params))
        decode = engine.tokenizer.decode
    found = [item for entry in entries for item in entry["logprobs"]]
    assert [item["token_id"] for item in found] == list(expected.token_ids)
    assert [item["logprob"] for item in found] == pytest.approx([item.logprob for item in expected.logprobs])
    assert [[top["token_id"] for top in item["top"]] for item in found] == [
        [token for token, _ in item.top] for item in expected.logprobs
    ]
    data = bytes(byte for item in found for byte in item["bytes"])
    assert data.decode(errors="replace") == decode(expected.token_ids, skip_special_tokens=False)
    assert entries[-1]["cumulative_logprob"] == pytest.approx(expected.cumulative_logprob)
    assert entries[-1]["times_ns"] == sorted(entries[-1]["times_ns"])
    assert "stop_reason" not in entries[-1]


def test_without_stream_an_answer_is_one_chunk(worker: Pipe) -> None:
    params = {"max_tokens": 20, "ignore_eos": True}
    worker.send({"op": "generate", "id": 41, "text_input": "abc", "params": params})
    streamed = worker.answer(41)
    worker.send({"op": "generate", "id": 42, "text_input": "abc", "params": params, "stream": False})
    (whole,) = worker.answer(42)
    assert whole["text"] == "".join(entry["text"] for entry in streamed)
    assert len(whole["token_ids"]) == 20


def test_a_timeout_ends_the_request_as_cancelled(worker: Pipe) -> None:
    message = {"op": "generate", "id": 61, "text_input": "abc", "timeout_s": 0.01}
    worker.send({**message, "params": {"max_tokens": 480, "ignore_eos": True}})
    error = worker.answer(61)[-1]
    assert (error["op"], error["kind"]) == ("error", "cancelled")
    assert error["message"].startswith("TC-513: the request did not end within its timeout of 0.01 s")


def test_limits_of_the_queue_are_options(model: Path) -> None:
    pipe = Pipe(str(model), "--device", "cpu", "--max-batch-size", "1", "--max-waiting", "0")
    assert pipe.receive()["op"] == "ready"
    params = {"max_tokens": 480, "ignore_eos": True}
    pipe.send({"op": "generate", "id": 1, "text_input": "abc", "params": params})
    assert pipe.receive()["id"] == 1
    pipe.send({"op": "generate", "id": 2, "text_input": "abc"})
    error = pipe.answer(2)[-1]
    pipe.process.kill()
    pipe.process.communicate()
    assert (error["kind"], error["message"][:6]) == ("unavailable", "TC-505")


@pytest.mark.parametrize("options", [["--max-waiting", "-1"], ["--max-queue-s", "nan"]])
def test_impossible_limits_are_reported(model: Path, options: list[str]) -> None:
    pipe = Pipe(str(model), *options)
    output, _ = pipe.process.communicate(timeout=60)
    message = json.loads(output)
    assert message["op"] == "failed" and message["message"].startswith("TC-509")


def test_shutdown_ends_the_process_cleanly(tiny: Tiny) -> None:
    pipe = Pipe(str(tiny("llama")), "--device", "cpu")
    assert pipe.receive()["op"] == "ready"
    pipe.send(
        {"op": "generate", "id": 1, "text_input": "abc", "params": {"max_tokens": 480, "ignore_eos": True}}
    )
    pipe.send({"op": "shutdown"})
    output, _ = pipe.process.communicate(timeout=60)
    messages = [entry for line in output.splitlines() for entry in entries_of(json.loads(line))]
    assert messages[-1]["finish_reason"] == "cancelled"
    assert pipe.process.returncode == 0


def test_an_engine_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    pipe = Pipe(str(tmp_path))
    output, _ = pipe.process.communicate(timeout=60)  # closes stdin as well
    message = json.loads(output)
    assert message["op"] == "failed"
    assert "engine.json" in message["message"]
    assert pipe.process.returncode == 1


def test_whatever_libraries_print_stays_out_of_the_protocol(tmp_path: Path) -> None:
    """Also output that bypasses sys.stdout, as C libraries and child processes make it."""
    program = (
        "import os, sys\n"
        "from toolchain.runtime import service, worker\n"
        "stream = worker.claim_stdout()\n"
        "print('python')\n"
        "os.write(1, b'descriptor\\n')\n"
        "os.system('echo child')\n"
        "service.Writer(stream).send({'op': 'ready'})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b'{"op": "ready"}\n'
    assert {b"python", b"descriptor", b"child"} <= set(done.stderr.split())
