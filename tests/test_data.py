"""Calibration text from files and through the datasets library, judged by the tokenizer of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.data.hub import read_hub_texts
from toolchain.plan.types import Calibration
from toolchain.quantize.calibration import load_calibration

Tiny = Callable[[str], Path]
MESSAGES = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_datasets_library_streams_texts_and_conversations(tmp_path: Path) -> None:
    """A local directory goes through the same loader as a name on the hub."""
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    assert list(read_hub_texts(str(tmp_path / "set"))) == ["one", "two"]
    write_jsonl(tmp_path / "chats" / "train.jsonl", [{"messages": MESSAGES}])
    assert list(read_hub_texts(str(tmp_path / "chats"))) == [MESSAGES]


def test_a_data_set_that_cannot_be_reached_is_one_clear_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    settings = Calibration(data="nobody/nothing-like-this", samples=1, length_tokens=8)
    with pytest.raises(ToolchainError, match=r"nobody/nothing-like-this.*hub"):
        load_calibration(settings, tiny("llama"))


def test_samples_are_whole_runs_of_the_joined_documents(tiny: Tiny, tmp_path: Path) -> None:
    """One byte is one token: the samples must be cut from the documents in some order, joined by the end token."""
    from transformers import AutoTokenizer

    texts = ["a" * 50, "b" * 70, "c" * 90]
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    settings = Calibration(data=str(data), samples=100, length_tokens=32, seed=3)
    found = load_calibration(settings, tiny("llama"))
    stream = AutoTokenizer.from_pretrained(tiny("llama")).decode(found.tokens.flatten())
    assert found.tokens.shape == ((50 + 70 + 90 + 3) // 32, 32)
    assert "".join(sorted(set(stream.replace("</s>", "")))) == "abc"
    whole, last = stream.split("</s>")[:-1], stream.split("</s>")[-1]
    assert len(whole) == 2 and set(whole) < set(texts)
    assert last and next(text for text in texts if text not in whole).startswith(last)
    again = load_calibration(settings, tiny("llama"))
    other = load_calibration(replace(settings, seed=4), tiny("llama"))
    assert again.identity == found.identity
    assert other.identity["tokens_sha256"] != found.identity["tokens_sha256"]


def test_the_chat_template_is_applied_when_asked(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": MESSAGES}])
    settings = Calibration(data=str(data), samples=1, length_tokens=33, chat_template=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    found = load_calibration(settings, tiny("llama"))
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.decode(found.tokens[0]).startswith(expected + "</s>")
    assert found.identity["template_sha256"]
    plain = load_calibration(replace(settings, chat_template=False, length_tokens=13), tiny("llama"))
    assert tokenizer.decode(plain.tokens[0]).startswith("why?\nbecause</s>")
    assert plain.identity["template_sha256"] is None


def test_a_missing_chat_template_is_said(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(UsageError, match="no chat template"):
        load_calibration(Calibration(data=str(data), chat_template=True), tmp_path / "model")
