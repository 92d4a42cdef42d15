"""Perplexity and KL against transformers' loss and torch's own divergence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.data.texts import read_texts
from toolchain.evaluate.checkpoint import compare, evaluate_checkpoint
from toolchain.evaluate.compare import compare_models
from toolchain.evaluate.perplexity import perplexity
from toolchain.evaluate.tokens import begin_token, encode_samples
from toolchain.runtime.engine import LocalEngine

Tiny = Callable[[str], Path]


def model_of(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def some_tokens(count: int) -> list[int]:
    import torch

    return torch.randint(4, 260, (count,), generator=torch.Generator().manual_seed(2)).tolist()


def loss(model: Any, row: list[int], first: int = 1) -> tuple[float, int]:
    """transformers' own loss over the tokens of ``row`` from ``first`` on: (sum of nats, tokens)."""
    import torch

    ids = torch.tensor([row])
    labels = ids.clone()
    labels[:, :first] = -100
    with torch.no_grad():
        mean = float(model(ids, labels=labels).loss)
    return mean * (len(row) - first), len(row) - first


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Any:
    return model_of(tiny("qwen3_moe"))


@pytest.mark.parametrize("bos", [None, 0])
def test_perplexity_equals_the_loss_of_transformers_on_the_same_windows(model: Any, bos: int | None) -> None:
    tokens = some_tokens(230)
    rows = [tokens[at : at + 50] for at in range(0, 230, 50)]
    parts = [loss(model, row if bos is None else [bos, *row]) for row in rows]
    count = sum(part[1] for part in parts)
    expected = sum(part[0] for part in parts) / count
    measured = perplexity(model, tokens, window=50, batch_size=3, bos=bos)
    assert measured["tokens"] == count == (225 if bos is None else 230)
    assert measured["nll"] == pytest.approx(expected, rel=1e-5)
    assert measured["ppl"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_overlapping_windows_score_every_token_once_with_context(model: Any) -> None:
    tokens = some_tokens(100)
    parts = [loss(model, tokens[:40])]
    parts += [loss(model, tokens[start : start + 40], first=24) for start in (16, 32, 48)]
    parts.append(loss(model, tokens[64:], first=24))
    measured = perplexity(model, tokens, window=40, stride=16)
    assert measured["tokens"] == sum(part[1] for part in parts) == 99
    assert measured["nll"] == pytest.approx(sum(part[0] for part in parts) / 99, rel=1e-5)


def test_an_engine_and_a_model_give_the_same_figures(model: Any, tiny: Tiny) -> None:
    import torch

    tokens = some_tokens(120)
    with LocalEngine.load(tiny("qwen3_moe"), device="cpu", dtype=torch.float32) as engine:
        assert perplexity(engine, tokens, window=64)["nll"] == pytest.approx(
            perplexity(model, tokens, window=64)["nll"], rel=1e-6
        )


def test_kl_equals_torch_in_float64(model: Any, tmp_path: Path) -> None:
    import torch

    from tests.tiny import make_tiny

    other = model_of(make_tiny("qwen3_moe", tmp_path / "other", seed=1))
    tokens = some_tokens(120)
    kl, agreed, nll = [], [], []
    for at in range(0, 120, 40):
        ids = torch.tensor([tokens[at : at + 40]])
        with torch.no_grad():
            mine, base = (item(ids).logits[0, :-1].double().log_softmax(-1) for item in (other, model))
        kl.append(torch.nn.functional.kl_div(mine, base, log_target=True, reduction="none").sum(-1))
        agreed.append(mine.argmax(-1) == base.argmax(-1))
        nll.append(torch.nn.functional.nll_loss(mine, ids[0, 1:], reduction="none"))
    expected = torch.cat(kl)
    measured = compare_models(other, model, tokens, window=40, batch_size=2)
    assert measured.tokens == len(expected) == 117
    assert measured.kl_mean == pytest.approx(float(expected.mean()), rel=1e-6)
    assert measured.kl_median == pytest.approx(float(expected.quantile(0.5)), rel=1e-6)
    assert measured.kl_p99 == pytest.approx(float(expected.quantile(0.99)), rel=1e-6)
    assert measured.top1_agreement == pytest.approx(float(torch.cat(agreed).double().mean()))
    assert measured.ppl == pytest.approx(math.exp(float(torch.cat(nll).mean())), rel=1e-6)
    assert measured.baseline_ppl == pytest.approx(perplexity(model, tokens, window=40)["ppl"], rel=1e-6)


def test_router_agreement_follows_the_router_logits_of_transformers(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    from tests.tiny import make_tiny
    from toolchain.modeling.loading import load_checkpoint

    directories = (tiny("qwen3_moe"), make_tiny("qwen3_moe", tmp_path / "other", seed=1))
    tokens = some_tokens(60)
    chosen = []
    for directory in directories:
        with torch.no_grad():
            routers = model_of(directory)(torch.tensor([tokens]), output_router_logits=True).router_logits
        chosen.append([layer.topk(2, dim=-1).indices.tolist() for layer in routers])
    expected = [
        sum(len(set(mine) & set(theirs)) for mine, theirs in zip(*layers, strict=True)) / (2 * len(tokens))
        for layers in zip(*chosen, strict=True)
    ]
    cpu = torch.device("cpu")
    models = [load_checkpoint(directory, device=cpu, dtype=torch.float32) for directory in directories]
    measured = compare_models(*models, tokens, window=60)
    assert list(measured.router_agreement_by_layer) == pytest.approx(expected)
    assert measured.router_agreement == pytest.approx(sum(expected) / len(expected))
    assert 0 < measured.router_agreement < 1


def test_a_dense_model_has_no_router_agreement(tiny: Tiny) -> None:
    metrics = compare(tiny("llama"), tiny("llama"), some_tokens(50), window=50, device="cpu")
    assert metrics.router_agreement is None


def test_a_checkpoint_against_itself_loses_nothing(tiny: Tiny) -> None:
    directory = tiny("mixtral")
    metrics = compare(directory, directory, some_tokens(100), window=50, device="cpu")
    assert (metrics.kl_mean, metrics.kl_median, metrics.kl_p99, metrics.top1_agreement) == (
        0.0,
        0.0,
        0.0,
        1.0,
    )
    assert metrics.ppl == metrics.baseline_ppl
    assert metrics.router_agreement == 1.0


def test_the_report_is_json_and_the_same_every_time(tiny: Tiny, tmp_path: Path) -> None:
    from tests.tiny import make_tiny

    data = tmp_path / "data.jsonl"
    lines = [{"text": "def f(x):\n    return x\n" * 8}, {"messages": [{"role": "user", "content": "why?"}]}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = make_tiny("qwen3_moe", tmp_path / "other", seed=1)
    options: dict[str, Any] = {
        "data": data,
        "max_tokens": 150,
        "window": 64,
        "device": "cpu",
        "generations": 0,
    }
    report = evaluate_checkpoint(other, baseline=tiny("qwen3_moe"), **options)
    assert json.loads(json.dumps(report)) == report
    assert report == evaluate_checkpoint(other, baseline=tiny("qwen3_moe"), **options)
    assert report["kl_mean"] > 0
    assert report["data"]["tokens"] == 128  # two whole windows
    alone = evaluate_checkpoint(tiny("qwen3_moe"), baseline=None, **options)
    assert alone["ppl"] == pytest.approx(report["baseline_ppl"])
    assert alone["data"] == report["data"]


def test_texts_of_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("plain\ntext")
    conversation = '{"messages": [{"role": "user", "content": "hi"}]}'
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028line"}\n\n' + conversation + "\n")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    expected = ["one\u2028line", [{"role": "user", "content": "hi"}], "plain\ntext"]
    assert list(read_texts(tmp_path)) == expected
    assert list(read_texts(tmp_path / "b.txt")) == expected[2:]


def test_samples_are_joined_with_the_end_token(tiny: Tiny) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokens = encode_samples(tokenizer, ["ab", [{"role": "user", "content": "c"}]], max_tokens=100, window=10)
    assert tokenizer.decode(tokens) == "ab</s><|im_start|>user\nc<|im_end|>\n"
    assert (
        encode_samples(tokenizer, ["abcdef"], max_tokens=3, window=3)
        == tokens[:2] + tokenizer("c")["input_ids"]
    )
    assert begin_token(tokenizer) is None


def test_few_tokens_are_taken_from_all_over_the_text(tiny: Tiny) -> None:
    """One byte is one token here: the windows must come from both ends and the middle, as they stand."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    text = "".join(chr(ord("a") + index // 100) for index in range(2000))
    tokens = encode_samples(tokenizer, [text], max_tokens=40, window=10)
    assert tokenizer.decode(tokens) == "a" * 10 + text[663:673] + text[1326:1336] + "t" * 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "fine"}\nnot json', r"data\.jsonl:2: not JSON"),
        ('{"texts": "x"}', r'data\.jsonl:1: expected an object with "text"'),
        ('{"messages": [{"role": "user"}]}', r"data\.jsonl:1: expected an object"),
        ("\n\n", "holds no text"),
    ],
)
def test_bad_data_is_named_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ToolchainError, match=said):
        list(read_texts(tmp_path / "data.jsonl"))


def test_bad_requests(tiny: Tiny, model: Any, tmp_path: Path) -> None:
    from tests.tiny import make_tiny

    with pytest.raises(UsageError, match="does not exist"):
        list(read_texts(tmp_path / "absent"))
    with pytest.raises(UsageError, match="window 1"):
        perplexity(model, some_tokens(10), window=1)
    with pytest.raises(UsageError, match="stride 9"):
        perplexity(model, some_tokens(10), window=8, stride=9)
    with pytest.raises(UsageError, match="1 tokens"):
        perplexity(model, some_tokens(1))
    small = make_tiny("llama", tmp_path / "small", vocab_size=300)
    with pytest.raises(UsageError, match="320 and 300"):
        compare(tiny("llama"), small, some_tokens(10), device="cpu")
