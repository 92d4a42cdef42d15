"""The worker process over its pipes, as the Triton stub uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.types import SamplingParams

Tiny = Callable[[str], Path]


class Pipe:
    """A worker process and the messages that come out of it."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "toolchain.runtime.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._entries: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any] | bytes) -> None:
        line = message if isinstance(message, bytes) else json.dumps(message).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next message; those of one round one by one."""
        assert self.process.stdout is not None
        if not self._entries:
            message: dict[str, Any] = json.loads(self.process.stdout.readline())
            self._entries = entries_of(message)
        return self._entries.pop(0)

    def answer(self, identity: int) -> list[dict[str, Any]]:
        """All messages of a request up to its end."""
        messages = []
        while True:
            message = self.receive()
            if message["id"] == identity:
                messages.append(message)
                if "finish_reason" in message or message.get("op") == "error":
                    return messages


def entries_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return list(message["chunks"]) if message["op"] == "chunks" else [message]


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 copy: in bfloat16 the rounding of a crowded batch may tip a token."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("worker") / "model"
    shutil.copytree(tiny("qwen3_moe"), directory)
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(directory)
    return directory


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


@pytest.mark.parametrize(
    ("line", "identity", "said"),
    [
        (b"not json", -1, "not a JSON line"),
        (b"\xff\xfe", -1, "not a JSON line"),
        (b"[1, 2]", -1, "expected a JSON object"),
        (b"[" * 100_000, -1, "not a JSON line"),
        (b'{"op": "dance", "id": 3}', 3, "unknown op 'dance'"),
        (b'{"op": "generate", "text_input": "x"}', -1, '"id"'),
        (b'{"op": "generate", "id": "4", "text_input": "x"}', -1, '"id"'),
        (b'{"op": "generate", "id": 4}', 4, "text_input"),
        (b'{"op": "generate", "id": 4, "text_input": "x", "prompt": "y"}', 4, "unknown fields prompt"),
        (b'{"op": "generate", "id": 4, "text_input": ""}', 4, "the prompt is empty"),
        (b'{"op": "generate", "id": 4, "text_input": "x", "params": []}', 4, "to be an object"),
        (
            b'{"op": "generate", "id": 4, "text_input": "x", "params": {"beam": 2}}',
            4,
            "unknown parameter 'beam'",
        ),
        (b'{"op": "generate", "id": 4, "text_input": "x", "params": {"max_tokens": true}}', 4, "max_tokens"),
        (b'{"op": "generate", "id": 4, "text_input": "x", "params": {"max_tokens": 0}}', 4, "max_tokens 0"),
        (b'{"op": "generate", "id": 4, "text_input": "x", "params": {"temperature": NaN}}', 4, "temperature"),
        (b'{"op": "generate", "id": 4, "text_input": "x", "params": {"stop": "a"}}', 4, "list of strings"),
        (b'{"op": "generate", "id": 4, "text_input": "x", "params": {"seed": -1}}', 4, "seed"),
    ],
)
def test_a_bad_message_is_answered_and_the_worker_goes_on(
    worker: Pipe, line: bytes, identity: int, said: str
) -> None:
    worker.send(line)
    message = worker.receive()
    assert (message["op"], message["id"], message["kind"]) == ("error", identity, "invalid_argument")
    assert said in message["message"]
    worker.send({"op": "generate", "id": 9, "text_input": "x", "params": {"max_tokens": 1, "seed": None}})
    assert worker.answer(9)[-1]["finish_reason"] == "length"


def test_an_id_in_use_is_refused(worker: Pipe) -> None:
    worker.send(
        {"op": "generate", "id": 21, "text_input": "x", "params": {"max_tokens": 480, "ignore_eos": True}}
    )
    worker.send({"op": "generate", "id": 21, "text_input": "x"})
    message = worker.receive()
    while message.get("op") != "error":
        message = worker.receive()
    assert (message["id"], message["kind"]) == (21, "invalid_argument")
    worker.send({"op": "cancel", "id": 21})
    assert worker.answer(21)[-1]["finish_reason"] == "cancelled"


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
