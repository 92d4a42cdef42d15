"""The model of target local in this process, with a script in place of the engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engine_dirs import write_engine
from tests.fake_triton import rendered_model
from toolchain.triton.render import render_repository

ENGINE = """
import json, sys
log = open(sys.argv[1], "a", buffering=1)
log.write(json.dumps(dict(op="started", arguments=sys.argv[2:])) + "\\n")
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
deaf = set()
say(op="ready", model="m", max_batch_size=2, max_seq_len=8, max_prompt_bytes=100)
for line in sys.stdin:
    log.write(line)
    message = json.loads(line)
    number, text = message.get("id"), message.get("text_input")
    if message["op"] == "cancel":
        if number not in deaf:
            say(op="chunks", chunks=[last(number, "", 0, "cancelled")], running=0, waiting=0)
    elif text == "deaf":
        deaf.add(number)
    elif message["op"] == "generate" and text == "refuse":
        say(op="error", id=number, kind="invalid_argument", message="TC-503: not this one")
    elif message["op"] == "generate" and text == "fail":
        say(op="chunks", chunks=[dict(op="error", id=number, kind="internal", message="TC-504: out of memory")])
    elif message["op"] == "generate" and message.get("stream") is False and text != "endless":
        say(op="chunks", chunks=[last(number, "Hello", 3)], running=0, waiting=0)
    elif message["op"] == "generate" and message.get("stream") is not False:
        say(op="chunks", chunks=[chunk(number, "Hel", 2)], running=1, waiting=0)
        if text != "endless":
            say(op="chunks", chunks=[last(number, "lo")], running=0, waiting=0)
"""


@contextmanager
def loaded_model(root: Path) -> Iterator[Any]:
    """A TritonPythonModel below ``root``; what its engine hears is in ``root / "heard.jsonl"``."""
    (root / "engine.py").write_text(ENGINE)
    python = root / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {root / "engine.py"} {root / "heard.jsonl"} "$@"\n')
    python.chmod(0o755)
    engine = write_engine(root / "engine")
    repository = render_repository(engine, root / "repo", python=str(python))
    with rendered_model(repository / "tensorrt_llm" / "1") as module:
        model = module.TritonPythonModel()
        served = repository / "tensorrt_llm" / "1" / "served.json"
        settings = {"cancellation_check_period_ms": 5, "max_waiting": 7, "max_queue_s": 2.5}
        served.write_text(json.dumps({**json.loads(served.read_text()), **settings}))
        sys.modules["metrics"].PERIOD_S = 0.02  # type: ignore[attr-defined]
        model.initialize({"model_name": "tensorrt_llm", "model_version": "1"})
        yield model
        model.finalize()


def ops(heard: Path, op: str) -> list[dict[str, Any]]:
    return [message for line in heard.read_text().splitlines() if (message := json.loads(line))["op"] == op]
