"""Many clients, slow clients, clients that leave and clients that send nonsense, on the real tritonserver.

Whatever one of them does, the others get the text that the engine gives each of them alone, in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import requests
from tritonclient import grpc
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from tests.engine_dirs import write_engine
from tests.worker_pipe import copy_in_float32
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.types import SamplingParams
from toolchain.triton.client import GenerateClient, RequestFailed
from toolchain.triton.install import find_server
from toolchain.triton.load import load_model, unload_model
from toolchain.triton.probes import read_load
from toolchain.triton.render import render_repository
from toolchain.triton.server import TritonServer
from toolchain.triton.stubs import find_stubs

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(find_server() is None, reason="no tritonserver: run `make tritonserver`"),
]
MODEL = "tensorrt_llm"
TIMEOUT_S = 60.0
CROWD = 200
LONG = 380
"""Tokens of an answer that others see begin and not end: the engine's rows are 512 long."""


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engines")
    return write_engine(root / "tiny", checkpoint=copy_in_float32(tiny("qwen3_moe"), root / "checkpoint"))


@pytest.fixture(scope="module")
def repository(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_repository(engine, tmp_path_factory.mktemp("triton_repo") / "tiny")


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, ready_timeout_s=120, exit_timeout_s=5) as running:
        yield running


@pytest.fixture(scope="module")
def alone(engine: Path) -> Iterator[Callable[[str, int], str]]:
    """The text of a prompt, with so many tokens, when nobody else asks."""
    with LocalEngine.load(engine, device="cpu") as loaded:
        yield (
            lambda prompt, count: (
                loaded.generate(prompt, SamplingParams(max_tokens=count, ignore_eos=True)).text
            )
        )


def prompt_of(index: int) -> str:
    return f"def f{index}(x):\n    return {'x + ' * (index % 13)}"


def length_of(index: int) -> int:
    return 1 + index * 7 % 23


def body_of(prompt: str, count: int, *, streaming: bool) -> dict[str, Any]:
    settings = {"sampling_param_max_tokens": count, "sampling_param_ignore_eos": True}
    return {"text_input": prompt, "streaming": streaming, **settings}


def tensor(name: str, kind: str, value: Any) -> grpc.InferInput:
    found = grpc.InferInput(name, list(np.shape(value)), kind)
    found.set_data_from_numpy(value)
    return found


def tensors(prompt: str | bytes, count: int) -> list[grpc.InferInput]:
    raw = prompt.encode() if isinstance(prompt, str) else prompt
    return [
        tensor("text_input", "BYTES", np.array([raw], dtype=np.object_)),
        tensor("streaming", "BOOL", np.array([True])),
        tensor("sampling_param_max_tokens", "INT32", np.array([count], dtype=np.int32)),
        tensor("sampling_param_ignore_eos", "BOOL", np.array([True])),
    ]


async def ask_grpc(client: aio.InferenceServerClient, prompt: str, count: int) -> str:
    async def one() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL, "inputs": tensors(prompt, count), "enable_empty_final_response": True}

    text = b""
    async for result, error in client.stream_infer(one(), stream_timeout=TIMEOUT_S):
        assert error is None, error
        found = result.as_numpy("text_output")
        text += b"" if found is None else found[0]
    # Until the server ends the stream: a client that leaves with the final flag may leave the request in tritonserver.
    return text.decode()


async def ask_http(
    session: aiohttp.ClientSession, base: str, prompt: str, count: int, *, streaming: bool
) -> str:
    url = f"{base}/v2/models/{MODEL}/{'generate_stream' if streaming else 'generate'}"
    async with session.post(url, json=body_of(prompt, count, streaming=streaming)) as response:
        assert response.status == 200, await response.text()
        if not streaming:
            return str((await response.json())["text_output"])
        lines = [line.decode() async for line in response.content]
    return "".join(json.loads(line.removeprefix("data: "))["text_output"] for line in lines if line.strip())


async def ask_all(server: TritonServer, count: int) -> list[str]:
    """Answers to ``count`` requests at once: half over gRPC, a quarter as server-sent events, a quarter whole."""
    connector = aiohttp.TCPConnector(limit=0)
    limit = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with (
        aio.InferenceServerClient(server.grpc_url) as client,
        aiohttp.ClientSession(connector=connector, timeout=limit) as session,
    ):
        work = [
            ask_grpc(client, prompt_of(index), length_of(index))
            if index % 2
            else ask_http(
                session, server.http_url, prompt_of(index), length_of(index), streaming=index % 4 == 0
            )
            for index in range(count)
        ]
        return await asyncio.gather(*work)


def ask(server: TritonServer, prompt: str, count: int) -> str:
    with GenerateClient(server.grpc_url) as client:
        settings = {"sampling_param_max_tokens": count, "sampling_param_ignore_eos": True}
        return "".join(piece.text for piece in client.stream(prompt, timeout_s=TIMEOUT_S, **settings))


def assert_serves(server: TritonServer, alone: Callable[[str, int], str]) -> None:
    """Eight requests at once, by all three ways, are answered as each is alone."""
    assert asyncio.run(ask_all(server, 8)) == [
        alone(prompt_of(index), length_of(index)) for index in range(8)
    ]


@contextlib.contextmanager
def open_stream(server: TritonServer, count: int = LONG, *, buffer: int = 0) -> Iterator[socket.socket]:
    """A raw connection on which /generate_stream answers ``count`` tokens. ``buffer``: of received bytes."""
    body = json.dumps(body_of("def long(", count, streaming=True)).encode()
    with socket.socket() as connection:
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(TIMEOUT_S)
        connection.connect(("127.0.0.1", server.http_port))
        head = f"POST /v2/models/{MODEL}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        yield connection


def running(server: TritonServer) -> int:
    load = read_load(server.metrics_url, timeout_s=TIMEOUT_S)[MODEL]
    return load.running + load.waiting


def outcomes(server: TritonServer) -> dict[str, float]:
    """toolchain_requests_total by its outcome."""
    found: dict[str, float] = {}
    for line in requests.get(server.metrics_url, timeout=TIMEOUT_S).text.splitlines():
        if line.startswith("toolchain_requests_total{"):
            labels, value = line.rsplit(" ", 1)
            outcome = labels.split('outcome="')[1].split('"')[0]
            found[outcome] = found.get(outcome, 0) + float(value)
    return found


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.1)


def memory_mib(pid: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def test_a_crowd_by_every_way_while_others_leave_and_send_nonsense(
    server: TritonServer, alone: Callable[[str, int], str]
) -> None:
    expected = [alone(prompt_of(index), length_of(index)) for index in range(CROWD)]
    ends = time.monotonic() + TIMEOUT_S
    done = False

    def disturb() -> int:
        rounds = 0
        while not done and time.monotonic() < ends:
            with open_stream(server) as connection:
                connection.recv(200)  # and leave
            with socket.create_connection(("127.0.0.1", server.grpc_port), TIMEOUT_S) as connection:
                connection.sendall(os.urandom(200))
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        disturbing = pool.submit(disturb)
        try:
            answers = asyncio.run(ask_all(server, CROWD))
        finally:
            done = True
        assert disturbing.result(TIMEOUT_S) > 0
    wrong = [index for index in range(CROWD) if answers[index] != expected[index]]
    assert wrong == []


def test_slow_readers_hold_nobody_up_and_lose_nothing(
    server: TritonServer, alone: Callable[[str, int], str]
) -> None:
    assert server.process is not None
    before = memory_mib(server.process.pid)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(open_stream(server, buffer=1024)) for _ in range(8)]
        begun = [
            connection.recv(64) for connection in slow
        ]  # all rows of the batch are taken by slow readers
        assert all(begun)
        for _ in range(3):
            assert_serves(server, alone)
        assert memory_mib(server.process.pid) - before < 64
        received = begun[0]
        for _ in range(3):  # an event in a while, then the rest
            received += slow[0].recv(100)
            time.sleep(0.2)
        while b"\r\n0\r\n\r\n" not in received:
            part = slow[0].recv(65536)
            assert part, "the connection ended within the answer"
            received += part
    assert text_of_events(received) == alone("def long(", LONG)


def text_of_events(raw: bytes) -> str:
    """The text of a chunked response of server-sent events."""
    rest = raw.partition(b"\r\n\r\n")[2]
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        body, rest = body + rest[:count], rest[count + 2 :]
    events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.strip()]
    return "".join(json.loads(event)["text_output"] for event in events)


def test_clients_that_leave_free_their_rows(server: TritonServer, alone: Callable[[str, int], str]) -> None:
    before = outcomes(server).get("cancelled", 0)
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(open_stream(server))
            with grpc.InferenceServerClient(server.grpc_url) as client:
                client.start_stream(lambda result, error: None)
                client.async_stream_infer(MODEL, tensors("def gone(", LONG))
                time.sleep(0.3)
                client.stop_stream(cancel_requests=True)
    # Some may have ended before. Metrics are told once a second.
    wait_until(lambda: outcomes(server).get("cancelled", 0) - before > 10, "more than 10 are cancelled")
    wait_until(lambda: running(server) == 0, "no request runs any more")
    assert_serves(server, alone)


def test_ten_megabytes_disturb_nobody(server: TritonServer, alone: Callable[[str, int], str]) -> None:
    prompt = "x = 1\n" * (10 * 2**20 // 6)
    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(lambda: [ask(server, prompt_of(index), 20) for index in range(10)])
        whole = requests.post(
            f"{server.http_url}/v2/models/{MODEL}/generate", json={"text_input": prompt}, timeout=TIMEOUT_S
        )
        with pytest.raises(RequestFailed, match="TC-50"):
            ask(server, prompt, 4)
        assert others.result(TIMEOUT_S) == [alone(prompt_of(index), 20) for index in range(10)]
    assert whole.status_code == 400 and "TC-50" in whole.json()["error"]


TEXT = tensor("text_input", "BYTES", np.array([b"a"], dtype=np.object_))


def number(name: str, value: Any, kind: str, dtype: Any) -> grpc.InferInput:
    return tensor(f"sampling_param_{name}", kind, np.array(value, dtype=dtype))


WRONG: dict[str, tuple[list[grpc.InferInput], str]] = {
    "nothing": ([], "text_input|expected"),
    "no text": ([number("max_tokens", [4], "INT32", np.int32)], "text_input"),
    "text as numbers": ([tensor("text_input", "INT32", np.array([5], dtype=np.int32))], "data-type|type"),
    "two prompts": ([tensor("text_input", "BYTES", np.array([b"a", b"b"], dtype=np.object_))], "2 strings"),
    "no prompt": ([tensor("text_input", "BYTES", np.array([], dtype=np.object_))], "empty|shape|elements"),
    "a matrix": ([tensor("text_input", "BYTES", np.array([[b"a"]], dtype=np.object_))], "shape"),
    "not UTF-8": ([tensor("text_input", "BYTES", np.array([b"\xff\xfe"], dtype=np.object_))], "UTF-8"),
    "unknown input": ([TEXT, tensor("image", "FP32", np.zeros(1, np.float32))], "image"),
    "other type": ([TEXT, number("max_tokens", [4], "INT64", np.int64)], "data-type|type"),
    "two lengths": ([TEXT, number("max_tokens", [4, 5], "INT32", np.int32)], "shape|elements"),
    "not a number": ([TEXT, number("temperature", [np.nan], "FP32", np.float32)], "finite"),
    "infinite": ([TEXT, number("top_p", [np.inf], "FP32", np.float32)], "finite"),
    "negative": ([TEXT, number("max_tokens", [-1], "INT32", np.int32)], "max_tokens"),
}


def test_clients_that_close_on_an_error_leave_the_model_replaceable(
    repository: Path, alone: Callable[[str, int], str], tmp_path: Path
) -> None:
    """tritonserver 2.51 keeps a request for ever when its client's leaving meets its final flag. On a server of its
    own: what other clients may have left there would be blamed on these."""
    copy = shutil.copytree(repository, tmp_path / "repository")
    with TritonServer(copy, ready_timeout_s=120, exit_timeout_s=5) as server:
        assert server.process is not None
        pid = server.process.pid
        for kind in ("no text", "two prompts", "not a number") * 5:
            with pytest.raises((RequestFailed, InferenceServerException)):
                asyncio.run(send(server, WRONG[kind][0]))
        wait_until(lambda: running(server) == 0, "no request runs any more")
        unload_model(server.grpc_url, MODEL)
        wait_until(lambda: not find_stubs(pid), "the model is unloaded")
        load_model(server.grpc_url, MODEL, timeout_s=TIMEOUT_S)
        assert_serves(server, alone)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors_are_named(kind: str, server: TritonServer) -> None:
    inputs, message = WRONG[kind]
    with pytest.raises((RequestFailed, InferenceServerException), match=message):
        asyncio.run(send(server, inputs))


async def send(server: TritonServer, inputs: list[grpc.InferInput]) -> None:
    async def one() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL, "inputs": inputs, "enable_empty_final_response": True}

    async with aio.InferenceServerClient(server.grpc_url) as client:
        async for _, error in client.stream_infer(one(), stream_timeout=10.0):
            if error is not None:
                raise error
            return


@pytest.mark.parametrize(
    ("endpoint", "body", "status"),
    [
        # 2.51 calls a body that is no JSON its own error.
        ("generate", b"", (400, 500)),
        ("generate", b"{", (400, 500)),
        ("generate", b"[]", (400, 500)),
        ("generate", b"\xff\xfe\x00", (400, 500)),
        ("generate", b'{"text_input": "a", "sampling_param_max_tokens": 99999999999999999999}', (400, 500)),
        ("generate", b'{"text_input": ["a", "b"]}', (400,)),
        ("generate", b'{"text_input": "a", "unknown": 1}', (400,)),
        ("generate", b'{"text_input": "\\ud800"}', (400, 500)),
        ("infer", b'{"inputs": []}', (400, 501)),
        ("nowhere", b"{}", (404, 400)),
    ],
)
def test_wrong_bodies_get_an_error_in_json(
    endpoint: str, body: bytes, status: tuple[int, ...], server: TritonServer
) -> None:
    response = requests.post(f"{server.http_url}/v2/models/{MODEL}/{endpoint}", data=body, timeout=TIMEOUT_S)
    assert response.status_code in status, response.text
    assert response.status_code == 404 or response.json()["error"]


def test_garbage_on_the_ports(server: TritonServer, alone: Callable[[str, int], str]) -> None:
    """Random bytes, a TLS greeting, a request that stops half-way, one that promises more than it sends."""
    pieces = (
        os.urandom(4096),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
        f"POST /v2/models/{MODEL}/generate HTTP/1.1\r\nContent-Le".encode(),
        f"POST /v2/models/{MODEL}/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n{{".encode(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(300),
        b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
    )
    with contextlib.ExitStack() as stack:
        for port in (server.http_port, server.grpc_port, server.metrics_port):
            for piece in pieces:
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
                with contextlib.suppress(ConnectionError):
                    connection.sendall(piece)
        assert_serves(server, alone)  # while all of them hang
    assert_serves(server, alone)
    wait_until(lambda: running(server) == 0, "no request runs any more")


def test_a_dead_stub_is_an_error_within_the_timeout(repository: Path, tmp_path: Path) -> None:
    """tritonserver tells nobody that a stub has died: the client's own deadline is what ends the wait."""
    copy = shutil.copytree(repository, tmp_path / "repository")
    server = TritonServer(copy, ready_timeout_s=120, exit_timeout_s=5)
    server.start()
    try:
        with GenerateClient(server.grpc_url) as client:
            stream = client.stream(
                "a", timeout_s=2.0, sampling_param_max_tokens=LONG, sampling_param_ignore_eos=True
            )
            next(stream)
            assert server.process is not None
            for stub in find_stubs(server.process.pid):
                os.kill(stub.pid, signal.SIGKILL)
            with pytest.raises(RequestFailed):
                list(stream)
        with GenerateClient(server.grpc_url) as client, pytest.raises(RequestFailed):
            list(client.stream("a", timeout_s=2.0))
    finally:
        server.kill()
