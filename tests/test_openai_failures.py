"""The OpenAI endpoint where something goes wrong behind it, in front of it, or in its own process.

Triton is a stand-in here that fails as its script says; the clients are the ``openai`` package and httpx.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.grpc_triton import wait_until
from tests.openai_endpoint import TIMEOUT_S, Running, endpoint, write_model

STALL_S, REQUEST_S = 1.0, 3.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(tokenizer: Path) -> Iterator[Running]:
    with endpoint(tokenizer, stall_timeout_s=STALL_S, request_timeout_s=REQUEST_S) as found:
        yield found


@pytest.fixture
def own(tokenizer: Path) -> Iterator[Running]:
    """One whose server or Triton the test stops."""
    with endpoint(tokenizer) as found:
        yield found


def complete(running: Running, prompt: str, **options: Any) -> Any:
    return running.client().completions.create(model="tiny", prompt=prompt, **options)


def events(response: httpx.Response) -> list[Any]:
    """The server-sent events of an answer, ``[DONE]`` as text."""
    datas = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("message", "error", "status", "code"),
    [
        ("TC-505: 1024 requests wait already", openai.RateLimitError, 429, "rate_limit_exceeded"),
        ("[request id: x] Exceeds maximum queue size", openai.RateLimitError, 429, "rate_limit_exceeded"),
        ("TC-503: max_seq_len is 8 with the answer", openai.BadRequestError, 400, "context_length_exceeded"),
        ("TC-501: bad sampling parameters: top_p 0.0", openai.BadRequestError, 400, None),
        ("unexpected inference input 'x' for model 'y'", openai.BadRequestError, 400, None),
        ("the engine process is being restarted", openai.InternalServerError, 503, "unavailable"),
        (
            "Stub process 'tensorrt_llm_0_0' is not healthy.",
            openai.InternalServerError,
            503,
            "unavailable",
        ),
        (
            "Request for unknown model: 'x' is not found",
            openai.InternalServerError,
            503,
            "unavailable",
        ),
        ("the forward failed", openai.InternalServerError, 500, None),
    ],
)
def test_what_the_model_refuses_has_the_status_that_clients_act_on(
    running: Running,
    stream: bool,
    message: str,
    error: type[openai.APIStatusError],
    status: int,
    code: str | None,
) -> None:
    with pytest.raises(error) as caught:
        complete(running, f"error:{message}", stream=stream)
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert message in caught.value.message
    assert ("retry-after" in caught.value.response.headers) == (status in (429, 503))


def test_the_openai_package_retries_what_is_said_to_be_retried(running: Running) -> None:
    client = running.client(max_retries=1)
    answer = client.completions.create(model="tiny", prompt="once:TC-505: full", seed=4711)
    assert answer.choices[0].text == "once:TC-505: full "
    tries = [inputs for inputs in running.script.requests if inputs.get("sampling_param_seed") == 4711]
    assert len(tries) == 2


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_an_error_in_mid_stream_is_an_event_and_the_stream_ends_without_done(
    running: Running, tmp_path: Path, route: str
) -> None:
    text = "midway:the forward failed"
    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages[0].content }}")
    body: dict[str, Any] = {"model": "tiny", "stream": True}
    if route == "/v1/completions":
        found = events(running.post(route, {**body, "prompt": text}))
    else:
        with endpoint(write_model(tmp_path / "model"), chat_template=template) as own:
            found = events(own.post(route, {**body, "messages": [{"role": "user", "content": text}]}))
    assert found[-1] == {
        "error": {"message": "the forward failed", "type": "server_error", "param": None, "code": None}
    }
    assert "[DONE]" not in found
    assert len(found) >= 2


def test_the_openai_package_raises_an_error_of_mid_stream(running: Running) -> None:
    stream = complete(running, "midway:the forward failed", stream=True)
    assert next(stream).choices[0].text == "one "
    with pytest.raises(openai.APIError, match="the forward failed"):
        next(stream)


@pytest.mark.parametrize(
    ("prompt", "message"), [("stall", "silent for 1 s after 1 pieces"), ("cut", "ended the answer before")]
)
def test_a_model_that_falls_silent_does_not_keep_its_client(
    running: Running, prompt: str, message: str
) -> None:
    with pytest.raises(openai.APIError, match=message):
        list(complete(running, prompt, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_never_answers_ends_at_the_deadline(running: Running, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        complete(running, "silent", stream=stream)
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_cannot_be_read_is_told(running: Running, count: int, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError, match="cannot be read") as caught:
        complete(running, "garbled", n=count, stream=stream)
    assert caught.value.status_code == 500


def test_without_triton_everything_but_health_says_so(own: Running) -> None:
    assert own.get("/health/ready").status_code == 200
    own.triton.stop()
    with pytest.raises(openai.InternalServerError) as caught:
        complete(own, "a b")
    assert caught.value.status_code == 503
    time.sleep(1.0)  # readiness is remembered for a second
    ready = own.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json()["models"]["tensorrt_llm"] != "ready"
    assert own.get("/health").status_code == 200


def test_a_model_that_answers_others_is_ready_although_the_probe_waits(tokenizer: Path) -> None:
    with endpoint(tokenizer, probe_timeout_s=0.5) as own:
        own.script.busy = True
        body = {"model": "tiny", "prompt": "endless", "stream": True}
        with (
            httpx.Client(timeout=TIMEOUT_S) as client,
            client.stream("POST", f"{own.url}/v1/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            for _ in range(3):
                assert [next(lines) for _ in range(50)]
                assert own.get("/health/ready").status_code == 200
        time.sleep(1.1)  # what was heard counts for a second
        assert own.get("/health/ready").status_code == 503


@pytest.mark.parametrize("prompt", ["silent", "stall"])
@pytest.mark.parametrize("stream", [False, True])
def test_requests_of_a_model_that_died_end_with_its_reason(own: Running, prompt: str, stream: bool) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: list(complete(own, prompt, stream=stream)))
        wait_until(lambda: own.script.requests, "the request is running")
        time.sleep(0.2)
        assert own.server.fail_requests("another", "no such") == 0
        assert own.server.fail_requests("tensorrt_llm", "the stub died and is loaded again") == 1
        with pytest.raises(openai.APIError, match="the stub died and is loaded again"):
            answer.result(TIMEOUT_S)
    assert complete(own, "a b").choices[0].text == "a b "


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("prompt", "stream"), [("silent", False), ("stall", True), ("endless", True)])
def test_a_client_that_leaves_ends_its_generations_by_the_stop_input(
    own: Running, prompt: str, stream: bool, count: int
) -> None:
    body = {"model": "tiny", "prompt": prompt, "stream": stream, "n": count}
    timeout = httpx.Timeout(TIMEOUT_S, read=1.0)
    url = f"{own.url}/v1/completions"
    with (
        httpx.Client(timeout=timeout) as client,
        client.stream("POST", url, json=body) if stream else _left(client, url, body) as response,
    ):
        if stream:
            next(response.iter_bytes())
    wait_until(lambda: len(own.script.stopped) == count, "every generation was stopped")
    assert len(set(own.script.stopped)) == count
    wait_until(lambda: 'status="499"' in own.get("/metrics").text, "the request was counted")
    assert not own.script.cancelled.is_set()


def _left(client: httpx.Client, url: str, body: Any) -> Any:
    """A client that gives up waiting for a whole answer."""
    with pytest.raises(httpx.ReadTimeout):
        client.post(url, json=body)
    return httpx.Client()


def test_a_reader_that_does_not_read_holds_nobody_else_up(own: Running) -> None:
    with socket.create_connection(("127.0.0.1", own.server.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "tiny", "prompt": "flood", "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        slow.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        sent = -1
        while sent != own.script.sent:
            sent = own.script.sent
            time.sleep(0.5)
            assert complete(own, "a b").choices[0].text == "a b "
            sent += 1  # the answer in between
    wait_until(lambda: len(own.script.stopped) == 1, "its generation was stopped when it left")


def test_draining_ends_running_streams_properly_and_refuses_new_requests(own: Running) -> None:
    words = " ".join(str(number) for number in range(60))
    with (
        httpx.Client(timeout=TIMEOUT_S) as client,
        client.stream(
            "POST",
            f"{own.url}/v1/completions",
            json={"model": "tiny", "prompt": f"slow:{words}", "stream": True},
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        drained: list[int] = []
        thread = threading.Thread(target=lambda: drained.append(own.server.drain(TIMEOUT_S)))
        thread.start()
        wait_until(lambda: own.get("/health/ready").status_code == 503, "it says that it drains")
        refused = own.post("/v1/completions", {"model": "tiny", "prompt": "a"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert own.get("/health").status_code == 200
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    thread.join(TIMEOUT_S)
    assert drained == [0]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{own.url}/health")


def test_a_stream_that_outlasts_the_drain_is_told(own: Running) -> None:
    with (
        httpx.Client(timeout=TIMEOUT_S) as client,
        client.stream(
            "POST", f"{own.url}/v1/completions", json={"model": "tiny", "prompt": "endless", "stream": True}
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        with ThreadPoolExecutor(1) as pool:
            cut = pool.submit(own.server.drain, 0.3)
            last = [line for line in lines if line][-1]
            assert cut.result(TIMEOUT_S) == 1
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"


def test_more_requests_than_the_endpoint_takes_are_told_to_come_back(tokenizer: Path) -> None:
    with endpoint(tokenizer, max_in_flight=2) as own, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(complete, own, "silent") for _ in range(2)]
        wait_until(lambda: len(own.script.requests) == 2, "two requests are open")
        with pytest.raises(openai.RateLimitError) as caught:
            complete(own, "a b")
        assert int(caught.value.response.headers["retry-after"]) > 0
        assert own.get("/health/ready").status_code == 200
        own.server.fail_requests("tensorrt_llm", "enough")
        for answer in waiting:
            with pytest.raises(openai.InternalServerError, match="enough"):
                answer.result(TIMEOUT_S)
        assert complete(own, "a b").choices


def test_a_port_in_use_is_told_before_anything_starts(own: Running, tokenizer: Path) -> None:
    from toolchain.core.errors import UsageError
    from toolchain.openai.server import OpenAiServer

    second = OpenAiServer(grpc_url="127.0.0.1:1", models={}, port=own.server.port)
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {own.server.port}") as caught:
        second.start()
    assert caught.value.code == "TC-624"
