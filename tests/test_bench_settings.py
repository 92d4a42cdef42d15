"""What a benchmark is asked: lengths and arrivals against their distributions, traces as they are published."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from toolchain.bench.arrivals import parse_arrival
from toolchain.bench.lengths import parse_lengths
from toolchain.bench.prompts import TokenCounter
from toolchain.bench.settings import Settings
from toolchain.bench.trace import Entry, read_trace
from toolchain.bench.work import Work
from toolchain.cli.bench_options import make_settings
from toolchain.core.errors import UsageError


def test_bad_settings_are_all_named() -> None:
    with pytest.raises(UsageError, match=r"concurrency \[4, 0\].*requests 0.*timeout_s -1"):
        Settings(concurrency=(4, 0), requests=0, timeout_s=-1)
    with pytest.raises(UsageError, match=r"both concurrency and rate.*arrival 'often'.*prompt_tokens '0'"):
        Settings(rate=(2.0,), arrival="often", prompt_tokens="0")
    with pytest.raises(UsageError, match="each once"):
        Settings(concurrency=(4, 4))


@pytest.mark.parametrize(
    ("text", "law", "mean"),
    [
        ("normal:256,64", stats.norm(256, 64), 256),
        ("uniform:64,512", stats.randint(64, 513), 288),
        ("lognormal:256,0.5", stats.lognorm(0.5, scale=256), 256 * np.exp(0.125)),
        ("exponential:300", stats.expon(scale=300), 300),
    ],
)
def test_lengths_follow_their_distribution(text: str, law: object, mean: float) -> None:
    generator, lengths = random.Random(1), parse_lengths(text)
    drawn = [lengths.draw(generator) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(mean, rel=0.05)
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(drawn, share) == pytest.approx(law.ppf(share), rel=0.08, abs=5)  # type: ignore[attr-defined]
    assert min(drawn) >= 1


def test_fixed_lengths() -> None:
    assert [parse_lengths(64).draw(random.Random(0)), parse_lengths(" 7 ").draw(random.Random(0))] == [64, 7]
    assert all(parse_lengths("normal:1,50").draw(random.Random(seed)) >= 1 for seed in range(50))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "1.5",
        "many",
        "normal:5",
        "normal:a,b",
        "uniform:9,3",
        "zipf:3",
        "uniform:1.5,3",
        "normal:nan,1",
    ],
)
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected") as caught:
        parse_lengths(text)
    assert caught.value.code == "TC-701"


@pytest.mark.parametrize(
    ("text", "cv"), [("poisson", 1.0), ("constant", 0.0), ("gamma:2", 2.0), ("gamma:0.5", 0.5)]
)
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(text: str, cv: float) -> None:
    times = list(itertools.islice(parse_arrival(text).times(5.0, random.Random(3)), 20_000))
    gaps = np.diff([0.0, *times])
    assert np.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.05, abs=1e-6)
    assert (gaps >= 0).all()


def test_poisson_arrivals_are_poisson() -> None:
    times = list(itertools.islice(parse_arrival("poisson").times(5.0, random.Random(3)), 2000))
    assert stats.kstest(np.diff([0.0, *times]), stats.expon(scale=0.2).cdf).pvalue > 0.01


@pytest.mark.parametrize("text", ["", "often", "gamma", "gamma:0", "gamma:-1", "gamma:x", "poisson:2"])
def test_arrivals_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected poisson"):
        parse_arrival(text)


def test_options_of_the_command_line() -> None:
    closed = make_settings({"concurrency": "1,8", "rate": None, "requests": None})
    assert (closed.concurrency, closed.rate, closed.requests) == ((1, 8), (), 32)
    opened = make_settings({"concurrency": None, "rate": "0.5,2"})
    assert (opened.concurrency, opened.rate, opened.open_loop) == ((), (0.5, 2.0), True)
    replayed = make_settings({"trace": "x.jsonl", "concurrency": None, "rate": None})
    assert (replayed.concurrency, replayed.rate, replayed.requests) == ((), (), 0)
    with pytest.raises(UsageError, match="--rate 'fast'"):
        make_settings({"rate": "fast"})


def written(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_mooncakes_traces(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 3052, "input_length": 7234, "output_length": 794, "hash_ids": [0, 28]},
        {"timestamp": 52, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1]},
    ]
    path = written(tmp_path, "mooncake.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read_trace(path) == (
        Entry(at_s=0.0, prompt_tokens=6755, output_tokens=500),
        Entry(at_s=pytest.approx(3.0), prompt_tokens=7234, output_tokens=794),
    )
    assert len(read_trace(path, limit=1)) == 1


def test_azures_traces(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,0\n"
    )
    found = read_trace(written(tmp_path, "azure.csv", text))
    assert found[0] == Entry(at_s=0.0, prompt_tokens=4808, output_tokens=10)
    assert found[1] == Entry(at_s=pytest.approx(0.052, abs=1e-6), prompt_tokens=3180, output_tokens=1)


def test_burst_gpts_traces(tmp_path: Path) -> None:
    heads = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    text = f"{heads}\n5,ChatGPT,472,18,490,Conversation log\n"
    assert read_trace(written(tmp_path, "burst.csv", text)) == (
        Entry(at_s=0.0, prompt_tokens=472, output_tokens=18),
    )


def test_prompts_of_data_sets(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "Hé?"},
        {"from": "gpt", "value": "Yes."},
    ]
    lines = [{"prompt": "Say.", "output_length": 3}, {"conversations": turns}, {"text_input": "x"}]
    path = written(tmp_path, "prompts.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    assert [entry.prompt for entry in read_trace(path)] == ["Say.", "Hé?", "x"]
    assert [entry.output_tokens for entry in read_trace(path)] == [3, None, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no request"),
        ("{}\n", "line 1: neither a prompt nor its length in nothing"),
        ('{"prompt": "a"}\n[1]\n', "line 2: a list"),
        ('{"prompt": "a"}\n\n{"prompt": \n', "line 3: no JSON"),
        ('{"input_length": "many"}\n', "input_length 'many'"),
        ('{"input_length": -4}\n', "input_length -4"),
        ('{"input_length": 4, "timestamp": "noon"}\n', "timestamp 'noon'"),
        ('{"input_length": 4, "timestamp": Infinity}\n', "finite"),
        ('{"input_length": 4, "timestamp": 1}\n{"input_length": 4}\n', "1 of 2 requests have no time"),
    ],
)
def test_traces_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_trace(written(tmp_path, "trace.jsonl", text))
    assert caught.value.code == "TC-708" and words in caught.value.message


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / "absent.jsonl")


@pytest.fixture(scope="module")
def counter(tiny: Callable[[str], Path]) -> TokenCounter:
    return TokenCounter(tiny("qwen3_moe"))


def test_work_is_the_same_for_the_same_seed_and_shares_no_prompt(counter: TokenCounter) -> None:
    settings = Settings(
        concurrency=(2, 4), requests=6, prompt_tokens="uniform:8,24", output_tokens="normal:8,3"
    )
    work, again = Work(settings, counter), Work(settings, counter)
    loads = [work.load(level, index=i, repeat=r) for i, level in enumerate(work.levels) for r in range(2)]
    prompts = [request.prompt for load in loads for request in load.requests]
    assert len(set(prompts)) == len(prompts)
    lengths = [[request.max_tokens for request in load.requests[: 2 + 6]] for load in loads[:2]]
    assert lengths[0] == lengths[1], "every repeat asks for the same lengths"
    assert work.load(work.levels[1], index=1, repeat=1) == again.load(again.levels[1], index=1, repeat=1)
    other = Work(Settings(concurrency=(2, 4), requests=6, seed=1), counter)
    assert other.load(other.levels[0], index=0, repeat=0).requests[0].prompt not in prompts


def test_prompts_have_the_wanted_length(counter: TokenCounter, tiny: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("qwen3_moe"))
    work = Work(Settings(concurrency=(4,), requests=20, prompt_tokens=37), counter)
    requests = work.load(work.levels[0], index=0, repeat=0).requests
    lengths = [len(tokenizer(item.prompt, add_special_tokens=False)["input_ids"]) for item in requests]
    assert all(35 <= length <= 37 for length in lengths)


def test_open_loads_keep_going_while_measured_requests_run(counter: TokenCounter) -> None:
    work = Work(Settings(concurrency=(), rate=(4.0,), requests=10, warmup=3), counter)
    load = work.load(work.levels[0], index=0, repeat=0)
    assert load.due_s is not None and len(load.due_s) == len(load.requests) == 3 + 10 + 10
    assert list(load.due_s) == sorted(load.due_s)
    timed = Work(Settings(concurrency=(), rate=(50.0,), duration_s=2.0, warmup=3), counter)
    load = timed.load(timed.levels[0], index=0, repeat=0)
    assert load.due_s is not None
    inside = [at for at in load.due_s if load.due_s[3] <= at < load.due_s[3] + 2.0]
    assert load.measured == len(inside) and load.measured == pytest.approx(100, rel=0.4)


def test_a_trace_is_replayed_at_its_times(counter: TokenCounter, tmp_path: Path) -> None:
    lines = [{"timestamp": 1000 * n, "input_length": 4 + n, "output_length": 2 + n} for n in range(5)]
    path = written(tmp_path, "trace.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    work = Work(Settings(concurrency=(), trace=str(path), requests=0, trace_speed=2.0), counter)
    load = work.load(work.levels[0], index=0, repeat=0)
    assert load.due_s == [0.0, 0.5, 1.0, 1.5, 2.0] and (load.warmup, load.measured) == (0, 5)
    assert [request.max_tokens for request in load.requests] == [2, 3, 4, 5, 6]
    assert [counter.count(request.prompt) for request in load.requests] == [4, 5, 6, 7, 8]
    closed = Work(Settings(concurrency=(2,), trace=str(path), requests=0), counter)
    load = closed.load(closed.levels[0], index=0, repeat=0)
    measured = load.requests[load.warmup : load.warmup + load.measured]
    assert [request.max_tokens for request in measured] == [2, 3, 4, 5, 6]
    cut = Work(Settings(concurrency=(), trace=str(path), requests=0, duration_s=2.5), counter)
    assert cut.load(cut.levels[0], index=0, repeat=0).measured == 3
