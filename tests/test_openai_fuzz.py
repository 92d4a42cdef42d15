"""Whatever a client sends to the OpenAI endpoint, it gets an answer in the shape of the API, and never a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.openai_endpoint import Running, endpoint, write_model
from toolchain.openai.fields import ChatRequest, CompletionRequest

TEXTS = (
    st.text(max_size=12)
    | st.text(st.characters(), max_size=6)
    | st.sampled_from(["auto", "text", "user", "x"])
)
NUMBERS = (
    st.integers()
    | st.integers(-3, 5)
    | st.floats()
    | st.sampled_from([0, 1, 2**31, 2**63, 2**64, -(2**63), 1e39, 1e-46, 0.5, 10**400])
)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text") | TEXTS}, optional={"text": TEXTS | VALUES}), max_size=3
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | TEXTS},
        optional={
            "content": TEXTS | PARTS | VALUES,
            "tool_calls": st.lists(st.dictionaries(st.sampled_from(["function", "id"]), VALUES), max_size=2),
            "name": TEXTS,
        },
    ),
    max_size=4,
)
PROMPTS = TEXTS | st.lists(TEXTS, max_size=3) | st.lists(st.integers(0, 300), max_size=6) | VALUES
DEEP = "[" * 900 + "]" * 900
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=300)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Its template writes tools and calls out, so that odd ones reach it."""
    root = tmp_path_factory.mktemp("fuzz")
    template = root / "tools.jinja"
    template.write_text(
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}{{ mode }}"
    )
    with endpoint(write_model(root / "model"), chat_template=template, request_timeout_s=5.0) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    """One connection for all: an answer after which the next request cannot begin would show."""
    with httpx.Client(base_url=running.url, timeout=20.0) as found:
        yield found


def some_of(fields: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from([*fields, "temprature", "functions"])
    return st.dictionaries(names, VALUES | NUMBERS, max_size=3)


def check(response: httpx.Response, sent: object) -> None:
    assert response.status_code < 500, (response.status_code, response.text[:500], sent)
    if response.status_code == 200:
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str), error
    assert error["message"], error


def post(client: httpx.Client, path: str, document: Any) -> httpx.Response:
    """As JSON that any language's encoder could have written, NaN and lone surrogates included."""
    content = json.dumps(document).encode()
    return client.post(path, content=content, headers={"content-type": "application/json"})


@SETTINGS
@given(prompt=PROMPTS, fields=some_of(sorted(CompletionRequest.model_fields)))
def test_completions(client: httpx.Client, prompt: Any, fields: dict[str, Any]) -> None:
    document = {"model": "tiny", "prompt": prompt, **fields}
    check(post(client, "/v1/completions", document), document)


@SETTINGS
@given(messages=MESSAGES, fields=some_of(sorted(ChatRequest.model_fields)))
def test_chats(client: httpx.Client, messages: Any, fields: dict[str, Any]) -> None:
    document = {"model": "tiny", "messages": messages, **fields}
    check(post(client, "/v1/chat/completions", document), document)


@SETTINGS
@given(
    body=st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()),
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/"]),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    content_type=st.sampled_from(
        ["application/json", "text/plain", "multipart/form-data", "application/x+json", "?"]
    ),
)
def test_any_bytes_on_any_route(
    client: httpx.Client, body: bytes, path: str, method: str, content_type: str
) -> None:
    headers = {"content-type": content_type}
    response = client.request(method, path, content=body, headers=headers)
    check(response, (method, path, body, content_type))


@SETTINGS
@given(name=st.text(max_size=20))
def test_any_name_of_a_model(client: httpx.Client, name: str) -> None:
    quoted = "".join(f"%{byte:02x}" for byte in name.encode("utf-8", "surrogatepass"))
    check(client.get(f"/v1/models/{quoted}"), name)


@pytest.mark.parametrize(
    "fields", ['"metadata": {"a": DEEP}', '"tools": [{"a": DEEP}]', '"tool_choice": DEEP', '"user": DEEP']
)
def test_documents_of_any_depth(client: httpx.Client, fields: str) -> None:
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "a b"}], FIELDS}'
    content = body.replace("FIELDS", fields.replace("DEEP", DEEP))
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=content, headers=headers)
    check(response, fields)
