"""Messages that the worker process cannot take: each is answered, and the others go on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker_pipe import Pipe, copy_in_float32, entries_of
from toolchain.runtime import service
from toolchain.runtime.engine import LocalEngine

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
        (
            b'{"op": "generate", "id": 4, "text_input": "x", "params": {"seed": 1' + b"0" * 400 + b"}}",
            4,
            "seed 10",
        ),
        (b'{"op": "generate", "id": 4, "text_input": "x", "params": {"logprobs": true}}', 4, "logprobs"),
        (b'{"op": "generate", "id": 4, "text_input": "x", "stream": "yes"}', 4, '"stream"'),
        (b'{"op": "generate", "id": 4, "text_input": "x", "timeout_s": 0}', 4, '"timeout_s"'),
        (b'{"op": "generate", "id": 4, "text_input": "x", "timeout_s": NaN}', 4, '"timeout_s"'),
        (b'{"op": "generate", "id": 4, "text_input": "a\\ud800"}', 4, "not valid Unicode"),
        (
            b'{"op": "generate", "id": 4, "text_input": "x", "params": {"max_tokens": 512}}',
            4,
            "max_tokens 512",
        ),
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


def test_ten_megabytes_are_refused_and_disturb_nobody(worker: Pipe) -> None:
    params = {"max_tokens": 30, "ignore_eos": True}
    worker.send({"op": "generate", "id": 51, "text_input": "abc", "params": params})
    worker.send({"op": "generate", "id": 52, "text_input": "x" * 10_000_000})
    messages = [worker.receive()]
    while (
        not ("finish_reason" in messages[-1] or messages[-1].get("op") == "error")
        or len({message["id"] for message in messages}) < 2
    ):
        messages.append(worker.receive())
    (error,) = [message for message in messages if message["id"] == 52]
    assert error["kind"] == "invalid_argument"
    assert error["message"].startswith("TC-503: the prompt has 10000000 bytes; max_seq_len is 512")
    if "finish_reason" not in [message for message in messages if message["id"] == 51][-1]:
        worker.answer(51)


class Heard:
    """Takes the place of the pipe to the parent."""

    def __init__(self) -> None:
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def send(self, message: dict[str, Any]) -> None:
        for entry in entries_of(message):
            self.messages.put(entry)

    def end_of(self, identity: int) -> str:
        while True:
            entry = self.messages.get(timeout=30)
            if entry.get("id") == identity and "finish_reason" in entry:
                return str(entry["finish_reason"])


def test_a_prompt_that_is_being_tokenized_holds_up_nobody_and_can_be_cancelled(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LONG_BYTES", 10)
    lines: queue.Queue[bytes | None] = queue.Queue()
    held, release, heard = threading.Event(), threading.Event(), Heard()
    with LocalEngine.load(tiny("llama"), device="cpu") as engine:
        real = engine.encoder.encode

        def slow(text: str, **options: Any) -> list[int]:
            if len(text) > 10:
                held.set()
                assert release.wait(30)
            return real(text, **options)

        monkeypatch.setattr(engine.encoder, "encode", slow)
        serving = service.Service(engine, heard)  # type: ignore[arg-type]
        thread = threading.Thread(target=serving.serve, args=(iter(lines.get, None),))
        thread.start()
        lines.put(b'{"op": "generate", "id": 1, "text_input": "a long prompt"}')
        assert held.wait(30)
        lines.put(b'{"op": "cancel", "id": 1}')
        lines.put(b'{"op": "generate", "id": 2, "text_input": "short"}')
        assert heard.end_of(2) in ("length", "stop")
        release.set()
        assert heard.end_of(1) == "cancelled"
        lines.put(None)
        thread.join(30)
