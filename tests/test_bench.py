"""Whole benchmarks: of a server that does nothing, of the real tritonserver, of the engine in this process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench_servers import Triton, over_grpc
from tests.conftest import Ran
from tests.engine_dirs import write_engine
from tests.grpc_triton import wait_until
from toolchain.bench.ceiling import Bare, Ceiling, NullServer, judge
from toolchain.bench.drive import Answer, Driven, Load
from toolchain.bench.prompts import TokenCounter
from toolchain.bench.results import read_result, write_result
from toolchain.bench.run import run_bench
from toolchain.bench.targets.base import Request, TargetSpec
from toolchain.bench.types import Level, Settings
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import sha256_file
from toolchain.triton.install import find_server
from toolchain.triton.render import render_repository
from toolchain.triton.server import TritonServer

__all__ = ["over_grpc"]
Run = Callable[..., Ran]
SHORT: dict[str, Any] = {"requests": 4, "prompt_tokens": 8, "output_tokens": 6}


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's own measurement, shorter than it is for users."""
    monkeypatch.setattr("toolchain.bench.ceiling.PACED_S", 0.1)
    monkeypatch.setattr("toolchain.bench.ceiling.MOST_TOKENS", 500)


@pytest.fixture(scope="module")
def tokenizer(tiny: Callable[[str], Path]) -> Path:
    return tiny("qwen3_moe")


@pytest.fixture(scope="module")
def nothing() -> Iterator[NullServer]:
    """Streams ``max_tokens`` tokens over HTTP as fast as it can."""
    server = NullServer("sse")
    yield server
    server.close()


@pytest.fixture(scope="module")
def nothing_over_grpc() -> Iterator[NullServer]:
    server = NullServer("grpc")
    yield server
    server.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.mark.parametrize("target", ["triton-http", "openai", "triton-grpc"])
def test_all_of_a_benchmark(
    target: str, nothing: NullServer, nothing_over_grpc: NullServer, tokenizer: Path, tmp_path: Path
) -> None:
    over_grpc = target == "triton-grpc"
    url = f"127.0.0.1:{nothing_over_grpc.port}" if over_grpc else f"http://127.0.0.1:{nothing.port}"
    settings = Settings(target=target, concurrency=(1, 3), repeats=2, ttft_slo_ms=60_000, **SHORT)
    records = tmp_path / "records.jsonl"
    result = run_bench(url, tokenizer_dir=tokenizer, settings=settings, model="null", records=records)
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result
    assert (result.target, result.model, result.partial, result.errors) == (target, "null", False, 0)
    assert [level.concurrency for level in result.levels] == [1, 3]
    for level in result.levels:
        assert [repeat.requests for repeat in level.repeats] == [4, 4] and level.requests == 8
        assert level.outstanding_peak == level.concurrency
        assert level.itl_ms is not None and level.itl_ms.count == 8 * 5
        assert level.ttft_ms is not None and level.ttft_ms.count == 8
        assert {"ttft_ms.p50", "itl_ms.mean", "output_tokens_per_s"} <= set(level.intervals)
        assert level.goodput is not None and level.goodput.share == 1.0
        found = level.generator
        assert found is not None and found.ceiling_tokens_per_s and found.ceiling_tokens_per_s > 0
        assert found.cpu_share is not None and found.limited == bool(found.why)
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert sum(line["measured"] for line in lines) == 2 * 2 * 4
    assert {len(line["pieces_ms"]) for line in lines} == {6}
    if target == "openai":
        assert result.token_counting == "by the server" and result.levels[0].output_tokens == 8 * 6
    else:
        assert "tokenizer" in result.token_counting


def test_an_open_loop_and_a_trace(nothing: NullServer, tokenizer: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{nothing.port}"
    common: dict[str, Any] = {
        "target": "openai",
        "ceiling": False,
        "repeats": 1,
        "prompt_tokens": 8,
        "concurrency": (),
    }
    result = run_bench(url, tokenizer_dir=tokenizer, settings=Settings(rate=(100.0,), requests=20, **common))
    (level,) = result.levels
    assert (level.requests, level.concurrency, level.rate, level.errors) == (20, None, 100.0, 0)
    assert level.generator is not None and level.generator.send_lag_p99_ms is not None
    assert result.load == "open loop, poisson, OpenAI completions, streaming"
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 10 * n, "input_length": 5, "output_length": 1 + n} for n in range(8)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = Settings(trace=str(trace), **{**common, "requests": 0})
    (level,) = run_bench(url, tokenizer_dir=tokenizer, settings=settings).levels
    assert (level.requests, level.output_tokens) == (8, sum(range(1, 9)))


def test_nobody_there(tokenizer: Path) -> None:
    with pytest.raises(ToolchainError, match="no Triton server answers") as caught:
        run_bench(f"grpc://127.0.0.1:{free_port()}", tokenizer_dir=tokenizer)
    assert caught.value.code == "TC-702"
    with pytest.raises(ToolchainError, match="answers neither") as caught:
        run_bench(f"http://127.0.0.1:{free_port()}", tokenizer_dir=tokenizer)
    assert caught.value.code == "TC-702"


def test_what_does_not_go_together(tokenizer: Path) -> None:
    with pytest.raises(UsageError, match="needs a server"):
        run_bench(tokenizer, tokenizer_dir=tokenizer, settings=Settings(target="openai"))
    with pytest.raises(UsageError, match="does not go with"):
        run_bench("127.0.0.1:1", tokenizer_dir=tokenizer, settings=Settings(target="inprocess"))


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer can be loaded"):
        TokenCounter(tmp_path)


def level(rate: float) -> Level:
    figures: dict[str, Any] = dict.fromkeys(("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"))
    counts: dict[str, Any] = {
        "requests": 1,
        "errors": 0,
        "error_messages": {},
        "prompt_tokens": 1,
        "output_tokens": 1,
    }
    return Level(
        **figures, **counts, duration_s=1.0, output_tokens_per_s=rate, requests_per_s=1.0, concurrency=1
    )


def driven(cpu_share: float, lag_s: float) -> Driven:
    answer = Answer(index=0, measured=True, due_s=1.0, sent_s=1.25, finished_s=2.0, piece_s=[])
    return Driven(
        answers=[answer], started_s=0.0, cpu_share=cpu_share, lag_s=[0.0] * 10 + [lag_s] * 10, outstanding_peak=1,
        held_back=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rate", "cpu_share", "lag_s", "words"),
    [
        (400.0, 0.5, 0.0005, []),
        (600.0, 0.5, 0.0005, ["600 tokens/s are 60% of the 1000"]),
        (400.0, 0.85, 0.0005, ["85% of a core"]),
        (400.0, 0.5, 0.0011, ["more than 10% of the ITL of 10.00 ms"]),
        (400.0, 0.5, 0.0110, ["more than 10 ms"]),
        (400.0, 0.1, 0.0110, ["only 10% of a core: the machine is busy"]),
        (600.0, 0.85, 0.0110, ["60%", "more than 10 ms", "85%"]),
    ],
)
def test_when_the_generator_is_the_limit(
    rate: float, cpu_share: float, lag_s: float, words: list[str]
) -> None:
    bare = Bare(tokens_per_s=1000.0, cpu_share=1.0, added_ttft_ms=1.0, jitter_p99_ms=0.1)
    found = judge(level(rate), bare, [driven(cpu_share, lag_s)], own_process=True, pace_ms=10.0)
    assert found.limited == bool(words) and len(found.why) == len(words)
    assert all(word in reason for word, reason in zip(words, found.why, strict=True))
    assert found.send_lag_p99_ms == pytest.approx(250.0) and found.lag_p99_ms == pytest.approx(1000 * lag_s)


def test_the_ceiling_is_measured_with_the_same_load() -> None:
    requests = [Request(prompt="a" * 50, max_tokens=4)] * 6
    load = Load(requests=requests, warmup=2, measured=4, concurrency=2)
    with Ceiling(TargetSpec(kind="triton-http", url="http://127.0.0.1:1", model="other")) as ceiling:
        found = ceiling.measure(load, users=2, pace_ms=5.0)
    assert found.tokens_per_s > 0 and found.cpu_share > 0
    assert found.added_ttft_ms >= 0 and found.jitter_p99_ms >= 0


def bench(toolchain: Run, server: NullServer, tokenizer: Path, *words: object) -> Ran:
    url = f"http://127.0.0.1:{server.port}"
    short = ("--requests", 3, "--repeats", 1, "--prompt-tokens", 8, "--output-tokens", 4, "--no-ceiling")
    return toolchain("bench", url, "--target", "openai", "--tokenizer", tokenizer, *short, *words)


def test_the_command(toolchain: Run, nothing: NullServer, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ran = bench(toolchain, nothing, tokenizer, "--concurrency", "1,2", "--output", out, "--json")
    assert ran.status == 0, ran.err
    assert ran.json == json.loads(out.read_text()) and ran.json["settings"]["target"] == "openai"
    assert [level["concurrency"] for level in ran.json["levels"]] == [1, 2]
    ran = bench(toolchain, nothing, tokenizer, "--rate", "200", "--ttft-slo", "5000")
    assert ran.status == 0 and "200/s" in ran.out and "100%" in ran.out
    assert bench(toolchain, nothing, tokenizer, "--output", out).status == 2, "nothing is overwritten"
    assert bench(toolchain, nothing, tokenizer, "--rate", "2", "--concurrency", "1").status == 2
    dry = bench(toolchain, nothing, tokenizer, "--dry-run", "--json")
    assert dry.json["dry_run"] and dry.json["concurrency"] == [1, 4, 16]


def test_ctrl_c_keeps_what_was_measured(
    over_grpc: tuple[Triton, TargetSpec], tokenizer: Path, tmp_path: Path
) -> None:
    script, spec = over_grpc
    out = tmp_path / "out.json"
    words = [
        str(Path(sys.executable).parent / "toolchain"),
        "bench",
        f"grpc://{spec.url}",
        "--model",
        spec.model,
    ]
    words += ["--tokenizer", str(tokenizer), "--output", str(out), "--concurrency", "1", "--requests", "2"]
    words += ["--repeats", "100000", "--prompt-tokens", "4", "--output-tokens", "2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # Four requests make a repeat: by the fortieth some are complete.
        wait_until(lambda: len(script.requests) >= 40, "forty requests", timeout_s=120)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert "INTERRUPTED" in stdout
    found = read_result(out)
    assert found.partial and 5 <= len(found.levels[0].repeats) < 100_000


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("bench") / "tiny", checkpoint=tiny("qwen3_moe"))


@pytest.fixture(scope="module")
def server(engine: Path) -> Iterator[TritonServer]:
    if find_server() is None:
        pytest.skip("no tritonserver: run `make tritonserver`")
    repository = render_repository(engine, engine.parent / "repo")
    with TritonServer(repository, ready_timeout_s=120) as running:
        yield running


@pytest.mark.server
@pytest.mark.parametrize("target", ["triton-grpc", "triton-http"])
def test_the_real_server(server: TritonServer, engine: Path, target: str) -> None:
    settings = Settings(target=target, concurrency=(1, 4), repeats=2, ceiling=False, **SHORT)
    result = run_bench(server, tokenizer_dir=engine, engine_dir=engine, settings=settings)
    environment = result.environment
    assert environment["server"]["name"] == "triton" and environment["server"]["version"]
    assert environment["engine"]["manifest_sha256"] == sha256_file(engine / "engine.json")
    for level in result.levels:
        assert (level.requests, level.errors, level.warmup_errors) == (8, 0, 0)
        assert 0 < level.output_tokens <= 8 * 6
        assert level.ttft_ms is not None and level.e2e_ms is not None
        assert level.ttft_ms.p50 <= level.e2e_ms.p50 <= level.e2e_ms.p99
        assert level.output_tokens_per_s > 0 and level.requests_per_s > 0


@pytest.mark.server
def test_failed_requests_are_shown(server: TritonServer, engine: Path) -> None:
    def measure(**changes: Any) -> None:
        settings = Settings(**{"concurrency": (2,), "ceiling": False, **SHORT, **changes})
        run_bench(server.grpc_url, tokenizer_dir=engine, settings=settings)

    with pytest.raises(
        ToolchainError, match=r"every request failed \(4 of 4\); 4 times: .*max_seq_len"
    ) as caught:
        measure(prompt_tokens=2000)
    assert caught.value.code == "TC-704"
    with pytest.raises(ToolchainError, match="did not finish its answer within"):
        measure(timeout_s=1e-6)
    with pytest.raises(ToolchainError, match="no ready model 'other'"):
        run_bench(server.grpc_url, tokenizer_dir=engine, model="other")


def test_the_engine_in_this_process(engine: Path) -> None:
    settings = Settings(concurrency=(1, 4), repeats=1, **SHORT)
    result = run_bench(engine, tokenizer_dir=engine, engine_dir=engine, settings=settings)
    assert (result.target, result.token_counting) == ("inprocess", "by the server")
    assert result.load == "closed loop, the engine in this process"
    for level in result.levels:
        assert (level.requests, level.errors, level.output_tokens) == (4, 0, 4 * 6)
        assert level.generator is not None and level.generator.cpu_share is None
        assert level.generator.ceiling_tokens_per_s and level.generator.ceiling_tokens_per_s > 0


def test_the_process_of_the_generator_ends_with_its_user(
    nothing: NullServer, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.bench.process import InItsProcess

    sender = InItsProcess(TargetSpec(kind="openai", url=f"http://127.0.0.1:{nothing.port}"))
    pid = sender._process.pid
    os.kill(pid, signal.SIGKILL)
    load = Load(requests=[Request(prompt="a", max_tokens=1)], warmup=0, measured=1, concurrency=1)
    with pytest.raises(ToolchainError, match="ended unexpectedly") as caught, sender:
        sender.run(load, lambda: None)
    assert caught.value.code == "TC-707" and sender._process.poll() is not None
