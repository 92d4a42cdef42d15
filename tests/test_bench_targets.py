"""Targets against servers that answer by a script, in the formats of Triton and OpenAI, whole and broken."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from tests.bench_servers import COUNTS, INPUTS, Triton, over_grpc
from toolchain.bench.address import find_target, parse_address
from toolchain.bench.targets import make_target
from toolchain.bench.targets.base import About, Piece, Request, RequestError, TargetSpec
from toolchain.bench.targets.sse import EventParser
from toolchain.core.errors import ToolchainError, UsageError

LINES = st.sampled_from(
    [
        "data: {}",
        "data:x",
        "data: Grüße, 世界",
        "data",
        ": keep-alive",
        "event: e",
        "id: 7",
        "retry: 3",
        "",
        "",
        "datax: 1",
    ]
)


@given(st.lists(LINES, max_size=30), st.sampled_from(["\n", "\r\n"]), st.lists(st.integers(1, 9), min_size=1))
def test_events_are_those_of_openais_decoder_however_they_are_cut(
    lines: list[str], end: str, cuts: list[int]
) -> None:
    stream = "".join(line + end for line in lines).encode()
    expected = [event.data.encode() for event in SSEDecoder().iter_bytes(iter([stream]))]
    parser, found, at = EventParser(), [], 0
    while at < len(stream):
        size = cuts[at % len(cuts)]
        found += parser.feed(stream[at : at + size])
        at += size
    # Theirs also gives events that have a name and no data; ours has no use for them.
    assert [data for data in found if data] == [data for data in expected if data]


def test_old_line_ends_and_a_missing_last_line() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\r\rdata: b\r") == [b"a"]
    assert parser.feed(b"\n\ndata: c") == [b"b"]
    assert parser.end() == [b"c"]


@dataclass
class Server:
    """An HTTP server in a thread: paths with handlers, and what was asked."""

    url: str = ""
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """(path, body, headers)"""


__all__ = ["over_grpc"]
Serve = Callable[[dict[str, Any]], Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """``serve({path: document | async function of request and body})``."""
    running: list[tuple[asyncio.AbstractEventLoop, threading.Thread, web.AppRunner]] = []

    def start(paths: dict[str, Any]) -> Server:
        server, ready, loop = Server(), threading.Event(), asyncio.new_event_loop()

        async def handle(request: web.Request) -> Any:
            body = json.loads(await request.read() or b"{}")
            server.asked.append((request.path, body, dict(request.headers)))
            found = paths.get(request.path)
            if found is None:
                return web.Response(status=404, text="not here")
            return await found(request, body) if callable(found) else web.json_response(found)

        async def run() -> None:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", handle)
            await (runner := web.AppRunner(app, access_log=None)).setup()
            running.append((loop, thread, runner))
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()

        def work() -> None:
            loop.run_until_complete(run())
            loop.run_forever()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert ready.wait(10)
        return server

    yield start
    for loop, thread, runner in running:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def streaming(*chunks: bytes) -> Any:
    """A handler that sends these chunks as they are."""

    async def handle(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        await response.write_eof()
        return response

    return handle


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def ask(spec: TargetSpec, *prompts: str, max_tokens: int = 3) -> tuple[About, list[list[Piece]]]:
    """Prepare a target and send it these prompts, one after the other."""

    async def run() -> tuple[About, list[list[Piece]]]:
        target = make_target(spec)
        try:
            about = await target.prepare()
            answers = [
                [piece async for piece in target.send(Request(prompt=prompt, max_tokens=max_tokens))]
                for prompt in prompts
            ]
            return about, answers
        finally:
            await target.close()

    return asyncio.run(run())


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}
DONE = b"data: [DONE]\n\n"


def choice(**values: Any) -> bytes:
    return event({"choices": [{"index": 0, "finish_reason": None, **values}]})


def openai(server: Server, **changes: Any) -> TargetSpec:
    return TargetSpec(**{"kind": "openai", "url": server.url, **changes})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})


def test_completions(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOOLCHAIN_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-of-this")
    whole = b": ping\n\n" + choice(text="Grü") + choice(text="ße")
    whole += choice(text="", finish_reason="length") + USAGE + DONE
    cut = whole.index("ü".encode()) + 1
    server = serve({"/v1/models": MODELS, "/v1/completions": streaming(whole[:3], whole[3:cut], whole[cut:])})
    about, (pieces,) = ask(openai(server, seed=7), "Hallo")
    assert (about.name, about.model, about.notes) == ("openai (vllm)", "m", ())
    assert text(pieces) == "Grüße"
    assert [piece.text for piece in pieces if piece.text] == ["Grü", "ße"]
    assert (pieces[-1].prompt_tokens, pieces[-1].output_tokens) == (5, 3)
    path, body, headers = server.asked[-1]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer sk-test-of-this"
    expected = {"model": "m", "prompt": "Hallo", "max_tokens": 3, "stream": True, "temperature": 0, "seed": 7}
    extras = {"stream_options": {"include_usage": True}, "ignore_eos": True, "min_tokens": 3}
    assert body == {**expected, **extras}


def test_chat_without_text_in_the_first_chunk_and_with_reasoning(serve: Serve) -> None:
    chunks = [choice(delta={"role": "assistant", "content": ""}), choice(delta={"reasoning_content": "Hm. "})]
    chunks += [choice(delta={"content": "Yes"}), choice(delta={}, finish_reason="stop"), DONE]
    server = serve({"/v1/models": MODELS, "/v1/chat/completions": streaming(*chunks)})
    _, (pieces,) = ask(openai(server, endpoint="chat", url=f"{server.url}/v1", ignore_eos=False), "Hi")
    assert [piece.text for piece in pieces] == ["", "Hm. ", "Yes", ""]
    assert pieces[-1].output_tokens is None, "no usage came"
    _, body, _ = server.asked[-1]
    assert body["messages"] == [{"role": "user", "content": "Hi"}] and "ignore_eos" not in body


@pytest.mark.parametrize(
    ("known", "sent", "words"),
    [
        ({"ignore_eos"}, {"ignore_eos"}, ""),
        ({"nvext"}, {"nvext"}, ""),
        (set(), set(), "ignore_eos"),
    ],
)
def test_what_a_server_refuses_is_left_out(serve: Serve, known: set[str], sent: set[str], words: str) -> None:
    common = {"model", "prompt", "max_tokens", "stream", "temperature", "seed", "stream_options"}
    answer = streaming(choice(text="a", finish_reason="length"), DONE)

    async def strict(request: web.Request, body: dict[str, Any]) -> Any:
        unknown = sorted(set(body) - common - known)
        if unknown:
            return web.json_response({"error": {"message": f"Unrecognized: {unknown}"}}, status=400)
        return await answer(request, body)

    server = serve({"/v1/models": MODELS, "/v1/completions": strict})
    about, _ = ask(openai(server), "x")
    assert set(server.asked[-1][1]) - common == sent
    assert words in " ".join(about.notes) and bool(about.notes) == bool(words)


def test_errors_of_openai_servers(serve: Serve) -> None:
    broken: dict[str, Any] = {
        "mid": streaming(choice(text="a"), event({"error": {"message": "engine died", "code": 500}})),
        "cut": streaming(choice(text="a")),
        "busy": lambda request, body: refused(429, {"error": {"message": "queue is full"}}),
        "plain": lambda request, body: refused(503, "try later"),
    }
    fine = streaming(choice(text="a", finish_reason="length"), DONE)

    async def refused(status: int, body: Any) -> web.Response:
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    async def answer(request: web.Request, body: dict[str, Any]) -> Any:
        return await broken.get(body["prompt"], fine)(request, body)

    server = serve({"/v1/models": MODELS, "/v1/completions": answer})
    expected = {
        "mid": "engine died",
        "cut": "the stream ended before the answer did",
        "busy": "HTTP 429: queue is full",
        "plain": "HTTP 503: try later",
    }
    for prompt, words in expected.items():
        with pytest.raises(RequestError) as caught:
            ask(openai(server), prompt)
        assert str(caught.value) == words


@pytest.mark.parametrize(
    ("paths", "model", "words"),
    [
        ({}, "", "/v1/models is answered with HTTP 404: not here"),
        ({"/v1/models": {"models": []}}, "", "is not OpenAI's"),
        ({"/v1/models": {"data": []}}, "", "no model at all"),
        ({"/v1/models": MODELS}, "other", "no model 'other'"),
        ({"/v1/models": MODELS}, "", "HTTP 404"),
    ],
)
def test_servers_that_cannot_be_measured(serve: Serve, paths: dict[str, Any], model: str, words: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        ask(openai(serve(paths), model=model), "x")
    assert caught.value.code == "TC-702" and words in caught.value.message


def triton(serve: Serve, inputs: list[str], stream: Any) -> TargetSpec:
    metadata = {"name": "m", "inputs": [{"name": name} for name in inputs]}
    about = {"name": "triton", "version": "2.51.0"}
    paths = {"/v2": about, "/v2/models/m": metadata, "/v2/models/m/generate_stream": stream}
    server = serve(paths)
    return TargetSpec(kind="triton-http", url=server.url, model="m")


def test_generate_stream(serve: Serve) -> None:
    stream = streaming(event({"text_output": "ab"}), event({"text_output": "c", "num_output_tokens": 3}))
    about, (pieces,) = ask(triton(serve, INPUTS + COUNTS, stream), "x")
    assert (about.name, about.version, text(pieces)) == ("triton", "2.51.0", "abc")
    assert pieces[-1].output_tokens == 3


def test_a_model_that_refuses_to_count_tokens_is_asked_without(serve: Serve) -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> Any:
        if "return_num_output_tokens" in body:
            return web.json_response({"error": "not supported"}, status=400)
        return await streaming(event({"text_output": "a"}))(request, body)

    _, (pieces,) = ask(triton(serve, INPUTS + COUNTS, answer), "x")
    assert text(pieces) == "a"


def test_the_ensemble_of_inflight_batching_has_other_names(serve: Serve) -> None:
    asked: list[dict[str, Any]] = []

    async def answer(request: web.Request, body: dict[str, Any]) -> Any:
        asked.append(body)
        return await streaming(event({"text_output": "a"}))(request, body)

    about, _ = ask(triton(serve, ["text_input", "max_tokens", "stream", "end_id"], answer), "x")
    assert asked[-1] == {"text_input": "x", "max_tokens": 3, "stream": True, "end_id": -1}
    assert about.notes == ()


def test_errors_of_triton(serve: Serve) -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> Any:
        if body["text_input"] == "refused":
            return web.json_response({"error": "TC-503: too long"}, status=400)
        rest = [event({"error": "stub died"})] if body["text_input"] == "mid" else []
        return await streaming(event({"text_output": "a"}), *rest)(request, body)

    for prompt, words in {"refused": "HTTP 400: TC-503: too long", "mid": "stub died"}.items():
        with pytest.raises(RequestError) as caught:
            ask(triton(serve, INPUTS, answer), prompt)
        assert str(caught.value) == words
    with pytest.raises(ToolchainError, match="no inputs text_input"):
        ask(triton(serve, ["INPUT0"], answer), "x")


def test_grpc_streaming(over_grpc: tuple[Triton, TargetSpec]) -> None:
    script, spec = over_grpc
    about, (pieces,) = ask(spec, "Grüße, 世界 !")
    assert (about.name, about.version, about.notes) == ("triton", "2.51.0", ())
    assert [piece.text for piece in pieces] == ["Grüße, ", "世界 ", "! "]
    assert (pieces[-1].prompt_tokens, pieces[-1].output_tokens) == (len("Grüße, 世界 !"), 3)
    sent = {"streaming": True, "sampling_param_max_tokens": 3, "sampling_param_seed": 7}
    assert script.requests[-1] == {
        **sent, "sampling_param_ignore_eos": True, "text_input": ["Grüße, 世界 !"]
    }  # fmt: skip
    script.inputs = (*INPUTS, *COUNTS)
    ask(spec, "a")
    assert script.requests[-1] == script.requests[-1] | dict.fromkeys(COUNTS, True)


def test_errors_over_grpc(over_grpc: tuple[Triton, TargetSpec]) -> None:
    script, spec = over_grpc
    for prompt, words in {"error:TC-503: no": "TC-503: no", "midway:stub died": "stub died"}.items():
        with pytest.raises(RequestError) as caught:
            ask(spec, prompt)
        assert str(caught.value) == words
    ended = [
        script.streams.get(timeout=10) for _ in range(4)
    ]  # each after the short request that finds out what works
    assert all(ended), "no stream is cancelled in the moment in which its request ends"
    with pytest.raises(ToolchainError, match="no ready model 'other'"):
        ask(TargetSpec(kind="triton-grpc", url=spec.url, model="other"), "x")
    script.inputs = ("INPUT0",)
    with pytest.raises(ToolchainError, match="no inputs text_input"):
        ask(spec, "x")


def test_a_request_that_is_left_is_cancelled(over_grpc: tuple[Triton, TargetSpec]) -> None:
    script, spec = over_grpc

    async def leave() -> None:
        target = make_target(spec)
        await target.prepare()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                async for _ in target.send(Request(prompt="endless", max_tokens=3)):
                    pass
        await target.close()

    asyncio.run(leave())
    assert [script.streams.get(timeout=10) for _ in range(2)] == [True, False]


def test_addresses() -> None:
    assert parse_address("127.0.0.1:8001").url("triton-grpc") == "127.0.0.1:8001"
    assert parse_address("grpc://host:8001").url("triton-grpc") == "host:8001"
    assert parse_address("http://host:8000/v1").url("openai") == "http://host:8000/v1"
    assert parse_address("https://nim.example").url("openai") == "https://nim.example:443"
    assert parse_address("[::1]:8001").url("triton-grpc") == "[::1]:8001"
    assert parse_address("localhost:1").local and not parse_address("10.9.8.7:1").local


@pytest.mark.parametrize(
    "url", ["localhost", ":8001", "127.0.0.1:grpc", "ftp://a:1", "grpc://a:1/x", "", "a:1:2"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="expected host:port") as caught:
        parse_address(url)
    assert caught.value.code == "TC-701"


def test_what_answers_at_an_address(serve: Serve) -> None:
    vllm, tritonserver, other = (serve(paths) for paths in ({"/v1/models": MODELS}, {"/v2": {}}, {}))
    assert find_target(parse_address(vllm.url), "auto") == "openai"
    assert find_target(parse_address(vllm.url.removeprefix("http://")), "auto") == "openai"
    assert find_target(parse_address(tritonserver.url), "auto") == "triton-http"
    assert find_target(parse_address(other.url.removeprefix("http://")), "auto") == "triton-grpc"
    with pytest.raises(ToolchainError, match="answers neither"):
        find_target(parse_address(other.url), "auto")
    with pytest.raises(UsageError, match="does not go with"):
        find_target(parse_address(vllm.url), "triton-grpc")
