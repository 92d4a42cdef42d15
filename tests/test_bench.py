"""Benchmarks: the arithmetic against numpy, the load against the real server."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine_dirs import write_engine
from toolchain.bench.prompts import TokenCounter, make_prompts
from toolchain.bench.run import grpc_address, run_bench, write_result
from toolchain.bench.statistics import distribution_ms, percentile, summarise
from toolchain.bench.types import Record, Settings
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import sha256_file
from toolchain.triton.install import find_server
from toolchain.triton.render import render_repository
from toolchain.triton.server import TritonServer


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


def test_distribution_is_in_milliseconds() -> None:
    seconds = np.linspace(0.010, 0.110, 101)
    found = distribution_ms(list(seconds))
    assert found is not None
    expected = [*np.percentile(seconds * 1000, [50, 90, 99]), seconds.mean() * 1000, 101]
    assert [found.p50, found.p90, found.p99, found.mean, found.count] == pytest.approx(expected)


def test_figures_of_two_answers_and_a_failure() -> None:
    records = [
        Record(started_s=1.0, piece_s=(1.5, 1.7, 2.1), finished_s=2.2, prompt_tokens=10, output_tokens=4),
        Record(started_s=2.0, piece_s=(2.1,), finished_s=2.1, prompt_tokens=10, output_tokens=1),
        Record(started_s=2.0, finished_s=9.0, prompt_tokens=10, error="timed out"),
    ]
    level = summarise(records, concurrency=2, duration_s=2.0, warmup_errors=1)
    assert (level.requests, level.errors, level.error_messages) == (3, 1, {"timed out": 1})
    assert level.ttft_ms is not None and level.ttft_ms.mean == pytest.approx((500 + 100) / 2)
    assert level.itl_ms is not None and level.itl_ms.mean == pytest.approx((200 + 400) / 2)
    assert level.tpot_ms is not None and level.tpot_ms.mean == pytest.approx(600 / 3)
    assert level.e2e_ms is not None and level.e2e_ms.mean == pytest.approx((1200 + 100) / 2)
    assert (level.output_tokens_per_s, level.requests_per_s) == (2.5, 1.0)


def test_nothing_but_failures_gives_no_figures() -> None:
    records = [Record(started_s=0.0, finished_s=1.0, error="down")] * 2
    level = summarise(records, concurrency=1, duration_s=1.0, warmup_errors=0)
    assert (level.ttft_ms, level.e2e_ms, level.errors) == (None, None, 2)


def test_bad_settings_are_all_named() -> None:
    with pytest.raises(UsageError, match=r"concurrency \[4, 0\].*requests 0.*timeout_s -1"):
        Settings(concurrency=(4, 0), requests=0, timeout_s=-1)


def test_prompts_have_the_wanted_length_and_differ(tiny: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    counter = TokenCounter(tiny("qwen3_moe"))
    prompts = make_prompts(counter, count=20, tokens=37, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny("qwen3_moe"))
    lengths = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    assert all(35 <= length <= 37 for length in lengths)
    assert len(set(prompts)) == 20
    assert prompts == make_prompts(counter, count=20, tokens=37, seed=3)
    assert prompts != make_prompts(counter, count=20, tokens=37, seed=4)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer can be loaded"):
        TokenCounter(tmp_path)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "localhost", ":8001", "127.0.0.1:grpc"])
def test_addresses_that_are_no_grpc_endpoint(url: str) -> None:
    with pytest.raises(UsageError, match="expected host:port"):
        grpc_address(url)


def test_nobody_there(tiny: Callable[[str], Path]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ToolchainError, match="no Triton server answers") as caught:
        run_bench(f"127.0.0.1:{port}", tokenizer_dir=tiny("qwen3_moe"))
    assert caught.value.code == "TC-702"


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
def test_real_server_under_load(server: TritonServer, engine: Path, tmp_path: Path) -> None:
    result = run_bench(
        server,
        tokenizer_dir=engine,
        engine_dir=engine,
        concurrency=[1, 4],
        requests=6,
        prompt_tokens=16,
        output_tokens=8,
    )
    write_result(tmp_path / "bench" / "result.json", result)
    document: dict[str, Any] = json.loads((tmp_path / "bench" / "result.json").read_text())
    assert (document["schema_version"], document["settings"]["output_tokens"]) == (1, 8)
    assert document["environment"]["server"] == {
        "name": "triton",
        "version": document["environment"]["server"]["version"],
    }
    assert document["environment"]["engine"]["manifest_sha256"] == sha256_file(engine / "engine.json")
    assert [level["concurrency"] for level in document["levels"]] == [1, 4]
    for level in document["levels"]:
        assert (level["requests"], level["errors"], level["warmup_errors"]) == (6, 0, 0)
        assert 0 < level["output_tokens"] <= 6 * 8
        assert level["ttft_ms"]["p50"] <= level["e2e_ms"]["p50"] <= level["e2e_ms"]["p99"]
        assert level["output_tokens_per_s"] == pytest.approx(level["output_tokens"] / level["duration_s"])


@pytest.mark.server
def test_failed_requests_are_shown(server: TritonServer, engine: Path) -> None:
    settings: dict[str, Any] = {"tokenizer_dir": engine, "concurrency": [2], "requests": 4}
    with pytest.raises(
        ToolchainError, match=r"every request failed \(4 of 4\); 4 times: .*max_seq_len"
    ) as caught:
        run_bench(server, prompt_tokens=2000, **settings)
    assert caught.value.code == "TC-704"
    with pytest.raises(ToolchainError, match="did not finish its answer within"):
        run_bench(server, timeout_s=1e-6, **settings)
    with pytest.raises(ToolchainError, match="no ready model 'other'"):
        run_bench(server.grpc_url, model="other", **settings)
