"""Who may use the OpenAI endpoint: addresses, keys, and what is refused before it starts."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import Ran
from tests.engine_dirs import write_engine
from tests.openai_endpoint import Running, endpoint, write_model
from toolchain.core.errors import UsageError
from toolchain.openai.keys import read_api_keys
from toolchain.openai.server import OpenAiServer
from toolchain.openai.settings import ServedModel
from toolchain.triton.engine_dir import read_engine_dir

KEYS = ("first-secret-key", "second-secret-key")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def guarded(model: Path) -> Iterator[Running]:
    with endpoint(model, api_keys=KEYS) as found:
        yield found


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens_it(guarded: Running, key: str) -> None:
    assert (
        guarded.client(api_key=key).completions.create(model="tiny", prompt="a b").choices[0].text == "a b "
    )


@pytest.mark.parametrize("key", ["first-secret-ke", "first-secret-keyy", "x" * 10_000, "schlüssel"])
def test_no_other_key_does(guarded: Running, key: str) -> None:
    headers = {"authorization": f"Bearer {key}".encode()}
    response = guarded.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert key not in response.text


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer  x", "Basic first-secret-key", "first-secret-key"])
def test_no_other_header_does(guarded: Running, header: str) -> None:
    assert guarded.get("/v1/models", headers={"authorization": header}).status_code == 401


def test_the_openai_package_sees_an_authentication_error(guarded: Running) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client(api_key="wrong-key").models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/nothing"])
def test_without_a_key_only_health_answers(guarded: Running, path: str) -> None:
    assert guarded.get(path).status_code == 401
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/health/ready").status_code == 200


def test_a_refused_body_leaves_the_connection_usable(guarded: Running) -> None:
    """It is read, not kept: what stayed of it would be taken for the next request."""
    before = len(guarded.script.requests)
    with httpx.Client(base_url=guarded.url, timeout=20.0) as client:
        for size in (1, 3_000_000):
            refused = client.post("/v1/completions", json={"model": "tiny", "prompt": "a" * size})
            assert refused.status_code == 401
            headers = {"authorization": f"Bearer {KEYS[0]}"}
            assert client.get("/v1/models", headers=headers).status_code == 200
    assert len(guarded.script.requests) == before


def test_who_waits_for_leave_to_send_a_body_gets_none_without_a_key(guarded: Running) -> None:
    with socket.create_connection(("127.0.0.1", guarded.server.port), timeout=20.0) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1000000\r\n\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org", ""])
def test_an_open_address_needs_a_key_or_the_word_that_it_shall_be_open(host: str) -> None:
    with pytest.raises(UsageError, match="would be open to everyone") as caught:
        OpenAiServer(grpc_url="127.0.0.1:1", models={}, host=host)
    assert caught.value.code == "TC-643"
    OpenAiServer(grpc_url="127.0.0.1:1", models={}, host=host, api_keys=KEYS)
    OpenAiServer(grpc_url="127.0.0.1:1", models={}, host=host, without_key=True)


def test_serve_refuses_an_open_address_without_keys_before_anything_starts(
    toolchain: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    engine = write_engine(tmp_path / "engine", checkpoint=model)
    words = ("serve", engine, "--repository", tmp_path / "repository", "--openai", "--dry-run")
    refused = toolchain(*words, "--openai-address", "0.0.0.0")
    assert refused.status == 2
    assert "TC-643" in refused.err and "--api-key-file" in refused.err
    # Triton has no keys to be asked for; its address says nothing about the endpoint's.
    assert toolchain(*words, "--address", "0.0.0.0").status == 0
    template = toolchain(*words, "--chat-template", tmp_path / "none.jinja")
    assert template.status == 2 and "none.jinja" in template.err
    assert not (tmp_path / "repository").exists()


def test_keys_are_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team's\nfirst-secret-key\n\n  second-secret-key  \nfirst-secret-key\n")
    assert read_api_keys(file) == KEYS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no API key"),
        (b"# only a comment\n", "holds no API key"),
        (b"long-enough-key\nshort\n", "line 2 is no API key"),
        (b"two words here\n", "line 1 is no API key"),
        ("schlüssel-schlüssel\n".encode(), "line 1 is no API key"),
        (b"\xff\xfe\x00", "no API keys can be read"),
        (None, "no API keys can be read"),
    ],
)
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_api_keys(file)
    assert caught.value.code == "TC-642"
    assert "short" not in caught.value.message.replace("shorter", "")


def test_keys_are_in_no_log(
    model: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG), endpoint(model, api_keys=KEYS) as own:
        own.client(api_key=KEYS[0]).models.list()
        own.get("/v1/models", headers={"authorization": "Bearer another-secret"})
        metrics = own.get("/metrics", headers={"authorization": f"Bearer {KEYS[0]}"}).text
        shown = [
            record.getMessage() for record in caplog.records if not record.name.startswith(("http", "openai"))
        ]
    text = "".join([*shown, *capfd.readouterr(), metrics])
    assert not [key for key in (*KEYS, "another-secret") if key in text]


def test_engines_of_targets_that_it_cannot_serve_are_refused(tmp_path: Path) -> None:
    served = ServedModel.of_engine(read_engine_dir(write_engine(tmp_path / "one", target="local")))
    assert (served.max_seq_len, served.aliases) == (512, ("one",))
    assert ServedModel.of_engine(read_engine_dir(write_engine(tmp_path / "two", target="trtllm"))).max_seq_len
    with pytest.raises(UsageError, match="ensemble has other tensors") as caught:
        ServedModel.of_engine(read_engine_dir(write_engine(tmp_path / "three", target="tensorrt")))
    assert caught.value.code == "TC-641"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{% for m in %}", "is no Jinja template")]
)
def test_a_chat_template_that_cannot_be_used_is_told_at_the_start(
    model: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "template.jinja"
    if text is not None:
        file.write_text(text)
    served = ServedModel(tokenizer=model, chat_template=file)
    with pytest.raises(UsageError, match=message) as caught:
        OpenAiServer(grpc_url="127.0.0.1:1", models={"tensorrt_llm": served})
    assert caught.value.code == "TC-644"
