"""What the OpenAI endpoint makes of a request: the prompt and the inputs that reach the model, the shape of the answer,
and what it refuses.

Prompts are compared with transformers' own chat templates; the answers are read by the ``openai`` package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.openai_endpoint import MAX_SEQ_LEN, WITH_BOS, Running, add_bos, endpoint, write_model
from toolchain.openai.settings import ServedModel

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe 漢?"},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "Sure?"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer puts BOS before a text, its chat template has none."""
    return add_bos(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    with endpoint(model, max_body_bytes=200_000) as found:
        yield found


@pytest.fixture(scope="module")
def templated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    template = tmp_path_factory.mktemp("template") / "with_bos.jinja"
    template.write_text(WITH_BOS)
    with endpoint(model, chat_template=template) as found:
        yield found


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A base model: a tokenizer without a chat template."""
    directory = write_model(tmp_path_factory.mktemp("base"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with endpoint(directory) as found:
        yield found


def seen(running: Running) -> dict[str, Any]:
    """The inputs of the last request that reached the model."""
    return running.script.requests[-1]


def chat(running: Running, messages: Any = None, **options: Any) -> Any:
    return running.client().chat.completions.create(
        model="tiny", messages=MESSAGES if messages is None else messages, **options
    )


def complete(running: Running, prompt: Any = "a b", **options: Any) -> Any:
    return running.client().completions.create(model="tiny", prompt=prompt, **options)


def refused(running: Running, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    """The error object of a request that must be refused with 400."""
    default = {"prompt": "a"} if path == "/v1/completions" else {"messages": MESSAGES}
    response = running.post(path, {"model": "tiny", **default, **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def test_a_chat_reaches_the_model_as_transformers_renders_it(running: Running, model: Path) -> None:
    chat(running)
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert seen(running)["text_input"] == [expected]
    assert seen(running)["sampling_param_add_special_tokens"] is False


def test_a_template_with_bos_gets_no_second_one(templated: Running, model: Path) -> None:
    chat(templated)
    tokenizer = AutoTokenizer.from_pretrained(model)
    (text,) = seen(templated)["text_input"]
    special = seen(templated)["sampling_param_add_special_tokens"]
    found = tokenizer(text, add_special_tokens=special)["input_ids"]
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=WITH_BOS, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert found == expected
    assert found.count(tokenizer.bos_token_id) == 1


def test_a_completion_leaves_bos_to_the_model(running: Running) -> None:
    complete(running, "a b")
    assert seen(running)["text_input"] == ["a b"]
    assert "sampling_param_add_special_tokens" not in seen(running)


def test_text_parts_are_joined_and_newer_roles_understood(running: Running) -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    newer = [{"role": "developer", "content": parts}, *MESSAGES[1:]]
    chat(running)
    expected = seen(running)["text_input"]
    chat(running, newer)
    assert seen(running)["text_input"] == expected


def test_tools_reach_a_template_that_takes_them(templated: Running, model: Path) -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    tools: list[Any] = [{"type": "function", "function": function}]
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "weather", "arguments": json.dumps({"city": "Köln"})},
    }
    messages = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    chat(templated, messages, tools=tools, tool_choice="auto")
    (text,) = seen(templated)["text_input"]
    assert "weather" in text
    assert "Köln" in text  # the arguments were JSON text; the template reads an object
    chat(templated, messages, tools=tools, tool_choice="none")
    assert "weather" not in seen(templated)["text_input"][0]


def test_template_variables_are_those_that_the_template_reads(templated: Running) -> None:
    chat(templated, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert seen(templated)["text_input"][0].endswith("assistant no thoughts ")
    path = "/v1/chat/completions"
    unknown = refused(templated, path, chat_template_kwargs={"enable_thoughts": False})
    assert "has no enable_thoughts; it reads enable_thinking" in unknown["message"]
    for name in ("chat_template", "tokenize", "bos_token", "messages"):
        assert f"has no {name}" in refused(templated, path, chat_template_kwargs={name: "x"})["message"]


def test_what_the_template_refuses_is_the_clients_mistake(templated: Running) -> None:
    error = refused(templated, "/v1/chat/completions", messages=[{"role": "user", "content": "refuse"}])
    assert "Roles must alternate" in error["message"]


def test_a_base_model_completes_but_does_not_chat(base: Running) -> None:
    assert complete(base, "a b").choices[0].text == "a b "
    error = refused(base, "/v1/chat/completions")
    assert error["code"] == "no_chat_template"
    assert "no chat template" in error["message"]


@pytest.mark.parametrize("text", ["def main():", "Größe 漢", "<|im_start|>user\nhi"])
def test_token_ids_become_the_text_that_they_encode(running: Running, model: Path, text: str) -> None:
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]
    complete(running, ids)
    assert seen(running)["text_input"] == [text]
    assert seen(running)["sampling_param_add_special_tokens"] is False
    answer = complete(running, [ids, ids])
    assert len(answer.choices) == 2


def test_token_ids_without_a_text_are_refused(running: Running, model: Path) -> None:
    ids = AutoTokenizer.from_pretrained(model)("漢", add_special_tokens=False)["input_ids"]
    assert "not what their text encodes to" in refused(running, prompt=ids[:2])["message"]
    assert "are not in 0..259" in refused(running, prompt=[5, 260])["message"]


def test_every_sampling_field_reaches_the_model(running: Running) -> None:
    complete(
        running,
        "a b",
        max_tokens=7,
        temperature=0.5,
        top_p=0.75,
        seed=11,
        stop=["x", "yz"],
        frequency_penalty=0.25,
        presence_penalty=-0.5,
        logprobs=3,
        echo=False,
        extra_body={"top_k": 5, "repetition_penalty": 1.25, "ignore_eos": True},
    )
    assert seen(running) == {
        "text_input": ["a b"],
        "streaming": False,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "sampling_param_max_tokens": 7,
        "sampling_param_temperature": 0.5,
        "sampling_param_top_p": 0.75,
        "sampling_param_top_k": 5,
        "sampling_param_seed": 11,
        "sampling_param_stop": ["x", "yz"],
        "sampling_param_frequency_penalty": 0.25,
        "sampling_param_presence_penalty": -0.5,
        "sampling_param_repetition_penalty": 1.25,
        "sampling_param_ignore_eos": True,
        "sampling_param_logprobs": 3,
    }
    complete(running, "a b", stop="x", echo=True, stream=True).close()
    assert seen(running)["sampling_param_stop"] == ["x"]
    assert seen(running)["sampling_param_exclude_input_from_output"] is False
    assert seen(running)["streaming"] is True


def test_defaults_are_those_of_openai(running: Running, model: Path) -> None:
    complete(running)
    assert (seen(running)["sampling_param_max_tokens"], seen(running)["sampling_param_temperature"]) == (
        16,
        1.0,
    )
    chat(running)
    ids = AutoTokenizer.from_pretrained(model).apply_chat_template(
        MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert seen(running)["sampling_param_max_tokens"] == MAX_SEQ_LEN - len(ids)
    assert seen(running)["sampling_param_temperature"] == 1.0
    chat(running, max_completion_tokens=5)
    assert seen(running)["sampling_param_max_tokens"] == 5


def test_n_answers_to_each_prompt_in_order_each_with_a_seed_of_its_own(running: Running) -> None:
    before = len(running.script.requests)
    answer = complete(running, ["a b", "c d e"], n=2, seed=-1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["a b ", "a b ", "c d e ", "c d e "]
    asked = running.script.requests[before:]
    seeds = sorted((inputs["text_input"][0], inputs["sampling_param_seed"]) for inputs in asked)
    assert seeds == [("a b", 0), ("a b", 2**64 - 1), ("c d e", 0), ("c d e", 2**64 - 1)]
    # Prompts count once, answers all; the stand-in counts characters and words.
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3 + 5, 2 + 2 + 3 + 3)
    assert answer.usage.total_tokens == 18


def test_the_chunks_of_several_answers_carry_their_index(running: Running) -> None:
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for chunk in complete(running, ["a b", "c d e"], n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert texts == {0: "a b ", 1: "a b ", 2: "c d e ", 3: "c d e "}
    assert set(reasons.values()) == {"stop"}


def test_a_streamed_chat_has_the_events_that_openai_sends(running: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    response = running.post("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    datas = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert datas.pop() == "[DONE]"
    chunks = [json.loads(data) for data in datas]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    usage = chunks.pop()
    assert usage["choices"] == []
    assert (
        usage["usage"]["total_tokens"]
        == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]
    )
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}
    whole = chat(running, body["messages"]).choices[0].message.content
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    without = running.post("/v1/chat/completions", body)
    assert '"usage"' not in without.text


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_openais_shapes(running: Running, stream: bool) -> None:
    text = "Größe 漢 x"
    found = complete(running, text, logprobs=2, stream=stream)
    parts = [choice.logprobs for chunk in (found if stream else [found]) for choice in chunk.choices]
    tokens = [token for part in parts if part for token in part.tokens]
    offsets = [offset for part in parts if part for offset in part.text_offset]
    assert tokens == ["Größe ", "漢 ", "x "]
    assert offsets == [0, 6, 8]  # characters, not bytes
    assert [value for part in parts if part for value in part.token_logprobs] == [-0.5] * 3
    answers = chat(running, [{"role": "user", "content": text}], logprobs=True, top_logprobs=2, stream=stream)
    choices = [choice for chunk in (answers if stream else [answers]) for choice in chunk.choices]
    content = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert "".join(bytes(token.bytes).decode() for token in content).count("漢") == 1
    assert all(len(token.top_logprobs) == 2 for token in content)
    chat(running, logprobs=True)
    assert seen(running)["sampling_param_logprobs"] == 0


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"messages": []}, "messages", "not a field of this endpoint"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 129}, "n", "more than 128"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"min_p": 0.1}, "min_p", "not supported"),
        ({"echo": True, "logprobs": 1}, "logprobs", "not together with echo"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only 'text'"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"model": 5}, "model", "valid string"),
    ],
)
def test_completions_refuse_by_name(
    running: Running, fields: dict[str, Any], param: str, message: str
) -> None:
    error = refused(running, **fields)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "needs a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
            "'image_url' is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages.0.content.0",
            "text only",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "takes no tools"),
        ({"tool_choice": "required"}, "tool_choice", "neither forced nor parsed"),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs"),
        ({"modalities": ["audio"]}, "modalities", "in text"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "has no reasoning_effort"),
        ({"functions": []}, "functions", "unknown field"),
        ({"prompt": "a"}, "prompt", "not a field of this endpoint"),
    ],
)
def test_chats_refuse_by_name(running: Running, fields: dict[str, Any], param: str, message: str) -> None:
    error = refused(running, "/v1/chat/completions", **fields)
    assert error["param"] == param
    assert message in error["message"]


def test_neutral_values_and_what_is_only_bookkeeping_pass(running: Running) -> None:
    neutral: dict[str, Any] = dict(
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", logit_bias={}, min_p=0, stop=None,
        response_format={"type": "text"}, frequency_penalty=0, top_k=-1, n=None, seed=None,
    )  # fmt: skip
    for path, extra in (
        ("/v1/completions", {"prompt": "a b", "best_of": 1, "suffix": "", "logprobs": None}),
        (
            "/v1/chat/completions",
            {
                "messages": MESSAGES,
                "tool_choice": "none",
                "parallel_tool_calls": True,
                "modalities": ["text"],
            },
        ),
    ):
        response = running.post(path, {"model": "tiny", **neutral, **extra})
        assert response.status_code == 200, response.text
        assert not [name for name in seen(running) if "penalty" in name or "top_k" in name]


def test_an_answer_can_be_sent_back_as_a_message(running: Running) -> None:
    message = chat(running).choices[0].message.model_dump()
    assert chat(running, [*MESSAGES, message, {"role": "user", "content": "and?"}]).choices


@pytest.mark.parametrize("prompt", ["a" * MAX_SEQ_LEN, "a" * 60_000, [7] * MAX_SEQ_LEN, [7] * 5000])
def test_a_prompt_beyond_the_context_is_told_as_openai_does(running: Running, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
        complete(running, prompt)
    assert caught.value.code == "context_length_exceeded"


def test_answers_beyond_the_context_are_refused_too(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="600 more were asked for") as caught:
        chat(running, max_tokens=600)
    assert caught.value.code == "context_length_exceeded"


def test_long_prompts_of_a_model_whose_context_is_not_known(model: Path) -> None:
    with endpoint(model, models={"tensorrt_llm": ServedModel(tokenizer=model)}) as own:
        client, long = own.client(), "word " * 20_000
        answer = client.completions.create(model="tensorrt_llm", prompt=long)
        assert answer.choices[0].text == long
        chat_messages: Any = [{"role": "user", "content": long}]
        client.chat.completions.create(model="tensorrt_llm", messages=chat_messages)
        assert long in seen(own)["text_input"][0]


def test_models_go_by_their_names(running: Running) -> None:
    client = running.client()
    assert [found.id for found in client.models.list()] == ["tiny", "tensorrt_llm"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.completions.create(model="tensorrt_llm", prompt="a b").model == "tensorrt_llm"
    for ask in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.completions.create(model="gpt-4", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="served: tiny, tensorrt_llm") as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_several_models_behind_one_endpoint(model: Path) -> None:
    models = {
        "first": ServedModel(tokenizer=model),
        "second": ServedModel(tokenizer=model, aliases=("newest",), max_seq_len=4),
    }
    with endpoint(model, models=models) as own:
        client = own.client()
        assert [found.id for found in client.models.list()] == ["first", "newest", "second"]
        for name in ("first", "newest", "second"):
            client.completions.create(model=name, prompt="a", max_tokens=1)
        assert own.script.models == ["first", "second", "second"]
        with pytest.raises(openai.BadRequestError, match="maximum context length is 4 tokens"):
            client.completions.create(model="newest", prompt="a b c d")
        assert set(own.get("/health/ready").json()["models"]) == {"first", "second"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b'{"model": "tiny", "prompt": ', {}, 400),
        (b"", {}, 400),
        (b"[1]", {}, 400),
        (b'"text"', {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"model": "tiny", "prompt": "a"}', {"content-type": "text/plain"}, 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', {}, 400),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b" " * 200_001, {}, 413),
    ],
)
def test_bodies_that_are_no_requests(
    running: Running, content: bytes, headers: dict[str, str], status: int
) -> None:
    response = httpx.post(
        f"{running.url}/v1/completions",
        content=content,
        headers={"content-type": "application/json", **headers},
    )
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_body_beyond_the_limit_is_not_kept_in_memory_but_answered(running: Running) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(10):
            yield b" " * 100_000

    response = httpx.post(f"{running.url}/v1/completions", content=parts())
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_routes_and_methods_that_do_not_exist(running: Running) -> None:
    assert running.get("/v1/embeddings").status_code == 404
    response = running.get("/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert httpx.options(f"{running.url}/v1/completions").headers.get("access-control-allow-origin") is None


def test_metrics_count_what_was_asked_and_answered(model: Path) -> None:
    with endpoint(model) as own:
        list(complete(own, "a b c", stream=True))
        complete(own, "a b")
        own.post("/v1/completions", {"model": "none", "prompt": "a"})
        lines = own.get("/metrics").text.splitlines()
    name = "toolchain_openai"
    for line in (
        f'{name}_requests_total{{route="/v1/completions",status="200"}} 2.0',
        f'{name}_requests_total{{route="/v1/completions",status="404"}} 1.0',
        f'{name}_choices_total{{finish_reason="stop",model="tensorrt_llm"}} 2.0',
        f'{name}_prompt_tokens_total{{model="tensorrt_llm"}} {len("a b c") + len("a b")}.0',
        f'{name}_completion_tokens_total{{model="tensorrt_llm"}} 5.0',
        f'{name}_time_to_first_token_seconds_count{{model="tensorrt_llm"}} 1.0',
        f'{name}_inter_token_seconds_count{{model="tensorrt_llm"}} 2.0',
        f'{name}_request_seconds_count{{model="tensorrt_llm"}} 2.0',
        f"{name}_requests_in_flight 0.0",
    ):
        assert line in lines, line
