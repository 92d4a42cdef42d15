"""The OpenAI endpoint in front of the real tritonserver: the ``openai`` package against transformers' own answers.

Skipped only where no tritonserver is installed; `make tritonserver` installs one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import requests
import torch
from openai import AsyncOpenAI, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine_dirs import write_engine
from tests.grpc_triton import wait_until
from tests.openai_endpoint import WITH_BOS, add_bos
from toolchain.openai.server import OpenAiServer
from toolchain.openai.settings import Bounds, ServedModel
from toolchain.triton.engine_dir import read_engine_dir
from toolchain.triton.install import find_server
from toolchain.triton.render import render_repository
from toolchain.triton.server import TritonServer
from toolchain.triton.sessions import session_members

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`"),
]
PROMPT = "def main(argument):\n    return "
MESSAGES: Any = [
    {"role": "system", "content": "Write Python."},
    {"role": "user", "content": "Größe 漢: def main(argument):"},
]
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, where a crowd changes no best token; its chat template writes BOS, its tokenizer adds one."""
    directory = tmp_path_factory.mktemp("openai") / "checkpoint"
    shutil.copytree(tiny("qwen3_moe"), directory)
    AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe"), dtype=torch.float32).save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": WITH_BOS}))
    return add_bos(directory)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Path:
    return write_engine(checkpoint.parent / "tiny", checkpoint=checkpoint)


@pytest.fixture(scope="module")
def triton(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = render_repository(engine, tmp_path_factory.mktemp("repository") / "tiny")
    with TritonServer(repository, ready_timeout_s=120) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint(engine: Path, triton: TritonServer) -> Iterator[OpenAiServer]:
    models = {"tensorrt_llm": ServedModel.of_engine(read_engine_dir(engine))}
    with OpenAiServer(grpc_url=triton.grpc_url, models=models) as running:
        yield running


@pytest.fixture(scope="module")
def client(endpoint: OpenAiServer) -> OpenAI:
    return OpenAI(base_url=f"{endpoint.url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


class Generated:
    """What transformers makes of ``ids`` without sampling."""

    def __init__(self, model: Any, tokenizer: Any, ids: list[int], max_tokens: int) -> None:
        self.prompt_tokens = len(ids)
        output = model.generate(torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False)
        self.ids: list[int] = output[0, len(ids) :].tolist()
        self.text: str = tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self.finish_reason = "length" if len(self.ids) == max_tokens else "stop"


@pytest.fixture(scope="module")
def generated(model: Any, tokenizer: Any) -> Callable[..., Generated]:
    def of(prompt: Any, max_tokens: int = 24) -> Generated:
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                prompt, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        return Generated(model, tokenizer, list(ids), max_tokens)

    return of


def streamed(chunks: Any) -> tuple[str, str | None, Any]:
    """(text, finish reason, usage) of the chunks of one answer."""
    text, reason, usage = "", None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
            reason = choice.finish_reason or reason
    return text, reason, usage


@pytest.mark.parametrize("prompt", [PROMPT, "x", "Größe 漢\n"])
def test_completions_are_those_of_transformers(
    client: OpenAI, generated: Callable[..., Generated], prompt: str
) -> None:
    expected = generated(prompt)
    settings: Any = dict(model="tiny", prompt=prompt, max_tokens=24, temperature=0)
    answer = client.completions.create(**settings)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert counts == (expected.prompt_tokens, len(expected.ids))
    chunks = client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    text, reason, usage = streamed(chunks)
    assert (text, reason) == (expected.text, expected.finish_reason)
    assert (usage.prompt_tokens, usage.completion_tokens) == counts


def test_chats_are_those_of_transformers_with_one_bos(
    client: OpenAI, generated: Callable[..., Generated]
) -> None:
    expected = generated(MESSAGES)
    settings: Any = dict(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0)
    answer = client.chat.completions.create(**settings)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    text, reason, _ = streamed(client.chat.completions.create(**settings, stream=True))
    assert (text, reason) == (expected.text, expected.finish_reason)


def test_token_ids_are_answered_like_their_text(
    client: OpenAI, tokenizer: Any, generated: Callable[..., Generated]
) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
    assert answer.choices[0].text == generated(PROMPT, 8).text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)


def test_echo_begins_with_the_prompt(client: OpenAI, generated: Callable[..., Generated]) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, echo=True)
    assert answer.choices[0].text == PROMPT + generated(PROMPT, 8).text


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI, generated: Callable[..., Generated]) -> None:
    whole = generated(PROMPT).text
    stop = whole[len(whole) // 2]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=[stop, "never"]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_transformers(
    client: OpenAI, model: Any, tokenizer: Any, generated: Callable[..., Generated]
) -> None:
    expected = generated(PROMPT, 6)
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + expected.ids])).logits[0, len(ids) - 1 : -1].float()
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(expected.ids).unsqueeze(1)).squeeze(1)
    best = logprobs.topk(3).values
    settings: Any = dict(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3)
    found = client.completions.create(**settings).choices[0]
    assert found.logprobs is not None
    assert found.logprobs.token_logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
    assert found.logprobs.text_offset is not None
    assert found.logprobs.text_offset == sorted(found.logprobs.text_offset)
    messages: Any = [{"role": "user", "content": "x"}]
    chat: Any = dict(model="tiny", messages=messages, max_tokens=6, temperature=0)
    content = (
        client.chat.completions.create(**chat, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    )
    assert len(content) == 6
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-5) for token in content)
    both = [
        token
        for chunk in client.completions.create(**settings, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.token_logprobs or []
    ]
    assert both == pytest.approx(chosen.tolist(), abs=1e-4)
    assert best[:, 0].tolist() == pytest.approx(chosen.tolist(), abs=1e-6)  # greedy takes the best


def test_n_answers_have_the_seeds_that_follow(client: OpenAI) -> None:
    settings: Any = dict(model="tiny", prompt=PROMPT, max_tokens=16, temperature=1.0, top_p=0.95)
    together = client.completions.create(**settings, n=3, seed=40)
    alone = [client.completions.create(**settings, seed=40 + index) for index in range(3)]
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    assert len({choice.text for choice in together.choices}) == 3
    assert together.usage is not None
    assert together.usage.completion_tokens == sum(
        answer.usage.completion_tokens for answer in alone if answer.usage
    )
    assert alone[0].usage is not None
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens


def test_penalties_and_extensions_reach_the_engine(client: OpenAI) -> None:
    settings: Any = dict(model="tiny", prompt="a" * 40, max_tokens=16, temperature=0)
    plain = client.completions.create(**settings).choices[0].text
    for extra in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 5.0}},
    ):
        assert client.completions.create(**settings, **extra).choices[0].text != plain, extra
    long = client.completions.create(**{**settings, "max_tokens": 100}, extra_body={"ignore_eos": True})
    assert long.choices[0].finish_reason == "length"


def test_two_hundred_streams_at_once_are_their_single_answers(
    endpoint: OpenAiServer, generated: Callable[..., Generated]
) -> None:
    prompts = [f"{number} {PROMPT[: number % 20]}" for number in range(200)]
    settings: Any = dict(model="tiny", max_tokens=8, temperature=0, stream=True)

    async def ask(client: AsyncOpenAI, prompt: str) -> str:
        chunks = await client.completions.create(prompt=prompt, **settings)
        return "".join([chunk.choices[0].text async for chunk in chunks if chunk.choices])

    async def ask_all() -> list[str]:
        options: Any = dict(api_key="unused", max_retries=0, timeout=TIMEOUT_S)
        async with AsyncOpenAI(base_url=f"{endpoint.url}/v1", **options) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(ask_all()) == [generated(prompt, 8).text for prompt in prompts]


def metric(triton: TritonServer, name: str, **labels: str) -> float:
    """A metric that the model tells Triton; 0 where it has not been told."""
    for line in requests.get(triton.metrics_url, timeout=10).text.splitlines():
        if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(
    endpoint: OpenAiServer, triton: TritonServer, client: OpenAI, stream: bool
) -> None:
    before = metric(triton, "toolchain_requests_total", outcome="cancelled")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": stream}
    with httpx.Client(timeout=httpx.Timeout(TIMEOUT_S, read=0.3)) as leaving:
        if stream:
            with leaving.stream("POST", f"{endpoint.url}/v1/completions", json=body) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(f"{endpoint.url}/v1/completions", json=body)
    wait_until(
        lambda: metric(triton, "toolchain_requests_total", outcome="cancelled") == before + 1,
        "the engine ended its request",
    )
    assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices


def test_what_the_model_refuses_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    # Too small for a float32: what passes here is refused by the engine.
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.completions.create(model="tiny", prompt="x", top_p=1e-50)


def test_an_engine_process_that_dies_is_told_and_comes_back(
    endpoint: OpenAiServer, triton: TritonServer, client: OpenAI
) -> None:
    settings: Any = dict(model="tiny", prompt="x", max_tokens=8, temperature=0)
    expected = client.completions.create(**settings).choices[0].text
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=500, extra_body={"ignore_eos": True}, stream=True
    )
    next(stream)
    os.kill(pid_of(triton, b"toolchain.runtime.worker"), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="TC-514"):
        list(stream)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**settings)
    assert caught.value.status_code == 503
    # What the package does by itself: it waits for as long as it is told, and asks again.
    patient = client.with_options(max_retries=10)
    assert patient.completions.create(**settings).choices[0].text == expected
    assert httpx.get(f"{endpoint.url}/health/ready", timeout=TIMEOUT_S).status_code == 200


def pid_of(triton: TritonServer, what: bytes) -> int:
    assert triton.process is not None
    for pid in session_members(triton.process.pid):
        if what in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(f"no process {what!r}")


def test_a_stub_that_dies_keeps_nobody_and_is_not_ready(engine: Path, tmp_path: Path) -> None:
    """Triton says nothing about it: the stall timeout does, and the inference behind /health/ready."""
    repository = render_repository(engine, tmp_path / "repository")
    models = {"tensorrt_llm": ServedModel.of_engine(read_engine_dir(engine))}
    bounds = Bounds(stall_timeout_s=1.5, probe_timeout_s=2.0)
    with (
        TritonServer(repository, ready_timeout_s=120) as triton,
        OpenAiServer(grpc_url=triton.grpc_url, models=models, bounds=bounds) as server,
    ):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT_S)
        settings: Any = dict(
            model="tiny", prompt="x", max_tokens=500, extra_body={"ignore_eos": True}, stream=True
        )
        streams = [client.completions.create(**settings) for _ in range(3)]
        for stream in streams:
            next(stream)
        os.kill(pid_of(triton, b"triton_python_backend_stub"), signal.SIGKILL)
        for stream in streams:
            with pytest.raises(openai.APIError):
                list(stream)
        # An answer of a second ago still counts: Triton may end the streams before that.
        deadline = time.monotonic() + 10
        while (status := httpx.get(f"{server.url}/health/ready", timeout=TIMEOUT_S).status_code) == 200:
            assert time.monotonic() < deadline, "a dead stub is called ready"
            time.sleep(0.1)
        assert status == 503
        assert httpx.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code == 200
