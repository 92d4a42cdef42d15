"""Training data: documents into sequences, two sides that share nothing, and every input that cannot be used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_tokenizer
from toolchain.core.errors import ToolchainError
from toolchain.plan.steps import Training
from toolchain.qat.data import load_sequences

END = 1
"""The end token of the tiny models."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a byte-level tokenizer: all that reading data needs."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 320})
    )
    write_tokenizer(directory)
    return directory


def document(number: int, words: int = 40) -> str:
    """Text that no other number has."""
    return " ".join(hashlib.sha256(f"{number} {word}".encode()).hexdigest()[:7] for word in range(words))


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(path: Path, numbers: range = range(60)) -> str:
    return write(path, [{"text": document(number)} for number in numbers])


def wanted(*data: str, **changes: Any) -> Training:
    small = dict(length_tokens=64, batch_size=2, held_out_tokens=256)
    return Training(**{"data": data, **small, **changes})


def decoded(rows: torch.Tensor, model: Path) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(model).decode(rows.flatten().tolist()))


def test_both_sides_are_of_other_documents(model: Path, tmp_path: Path) -> None:
    found = load_sequences(wanted(texts(tmp_path / "a.jsonl")), model)
    assert found.train.dtype == torch.int64 and found.train.shape[1] == found.held_out.shape[1] == 64
    first_words = {number: document(number).split()[20] for number in range(60)}
    train, held_out = decoded(found.train, model), decoded(found.held_out, model)
    of_train = {number for number, word in first_words.items() if word in train}
    of_held_out = {number for number, word in first_words.items() if word in held_out}
    assert of_train and of_held_out and not of_train & of_held_out
    assert found.identity["documents"]["train"] + found.identity["documents"]["held_out"] == 60


def test_documents_end_where_they_end(model: Path, tmp_path: Path) -> None:
    """A sequence may begin within a document, and the end token stands between two of them."""
    found = load_sequences(wanted(texts(tmp_path / "a.jsonl"), seed=3), model)
    ends = int((found.train == END).sum())
    expected = found.identity["documents"]["train"]
    assert abs(ends - expected) <= 1, "the last document may be cut off"


def test_identity_is_of_what_is_trained_on(model: Path, tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl")
    found, again = (load_sequences(wanted(source), model) for _ in range(2))
    assert torch.equal(found.train, again.train) and found.identity == again.identity
    assert found.identity["train_sha256"] == hashlib.sha256(found.train.numpy().tobytes()).hexdigest()
    assert found.identity["tokens"]["held_out"] == found.held_out.numel()
    other = load_sequences(wanted(source, seed=1), model)
    assert other.identity["train_sha256"] != found.identity["train_sha256"]
    assert other.identity["held_out_sha256"] != found.identity["held_out_sha256"]


def test_an_added_document_moves_no_other_to_the_held_out_side(model: Path, tmp_path: Path) -> None:
    few = load_sequences(wanted(texts(tmp_path / "a.jsonl"), held_out_share=0.2), model)
    more = load_sequences(wanted(texts(tmp_path / "b.jsonl", range(61)), held_out_share=0.2), model)
    told = {number: document(number).split()[20] for number in range(61)}
    first, second = decoded(few.held_out, model), decoded(more.held_out, model)
    before, after = ({number for number, word in told.items() if word in text} for text in (first, second))
    assert before and len(before - after) <= 1 and len(after - before) <= 1


def test_copies_are_dropped(model: Path, tmp_path: Path) -> None:
    records = [{"text": document(number % 40)} for number in range(80)]
    found = load_sequences(wanted(write(tmp_path / "a.jsonl", records)), model)
    once = load_sequences(wanted(write(tmp_path / "b.jsonl", records[:40])), model)
    assert found.identity["documents"]["duplicates_dropped"] == 40
    assert found.identity["train_sha256"] == once.identity["train_sha256"]


def test_few_steps_see_many_documents(model: Path, tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", range(400))
    found = load_sequences(wanted(source, steps=8, accumulate=2), model)
    assert len(found.train) == 8 * 2 * 2
    seen = sum(document(number).split()[10] in decoded(found.train, model) for number in range(400))
    assert seen > 5, "sequences of one document after the other would be of five"


def test_held_out_text_of_its_own(model: Path, tmp_path: Path) -> None:
    train, held_out = texts(tmp_path / "a.jsonl"), texts(tmp_path / "b.jsonl", range(100, 110))
    found = load_sequences(wanted(train, held_out=(held_out,)), model)
    assert found.identity["documents"]["train"] == 60
    assert document(105).split()[3] not in decoded(found.train, model)
    assert len(found.held_out) == 256 // 64


def test_token_ids_are_taken_as_they_are(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    digest = hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    ids = [tokenizer(document(number), add_special_tokens=False).input_ids for number in range(60)]
    records = [{"input_ids": item, "tokenizer_sha256": digest} for item in ids]
    found = load_sequences(wanted(write(tmp_path / "ids.jsonl", records)), model)
    assert int((found.train == END).sum()) >= found.identity["documents"]["train"] - 1
    windows = found.train.unfold(1, 20, 1).reshape(-1, 20)
    starts = [torch.tensor(item[:20]) for item in ids]
    assert any((windows == start).all(1).any() for start in starts)


def test_conversations_go_through_the_chat_template(model: Path, tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": document(n)}, {"role": "assistant", "content": "ok"}]}
        for n in range(60)
    ]
    found = load_sequences(wanted(write(tmp_path / "a.jsonl", records), chat_template=True), model)
    assert "<|im_start|>user" in decoded(found.train, model) and found.identity["template_sha256"]


def refuse_empty(directory: Path) -> Training:
    return wanted(write(directory / "a.jsonl", [{"text": ""}]))


def refuse_missing(directory: Path) -> Training:
    return wanted(str(directory / "absent.jsonl"))


def refuse_none(directory: Path) -> Training:
    return wanted()


def refuse_line(directory: Path) -> Training:
    (directory / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return wanted(str(directory / "a.jsonl"))


def refuse_record(directory: Path) -> Training:
    return wanted(write(directory / "a.jsonl", [{"text": document(0)}, {"tokens": [1, 2]}]))


def refuse_bytes(directory: Path) -> Training:
    (directory / "a.txt").write_bytes(b"\xff\xfe\x00bad")
    return wanted(str(directory / "a.txt"))


def refuse_short(directory: Path) -> Training:
    return wanted(texts(directory / "a.jsonl", range(8)), batch_size=64, accumulate=4, held_out_tokens=64)


def refuse_one_document(directory: Path) -> Training:
    (directory / "a.txt").write_text(document(0, 400))
    return wanted(str(directory / "a.txt"))


def refuse_ids(directory: Path) -> Training:
    return wanted(write(directory / "a.jsonl", [{"input_ids": [n, 5, 400] * 60} for n in range(60)]))


def refuse_words_as_ids(directory: Path) -> Training:
    return wanted(write(directory / "a.jsonl", [{"input_ids": ["a", "b"]}]))


def refuse_other_tokenizer(directory: Path) -> Training:
    records = [{"input_ids": [n, 5, 9] * 60, "tokenizer_sha256": "0" * 64} for n in range(60)]
    return wanted(write(directory / "a.jsonl", records))


def refuse_trained_on(directory: Path) -> Training:
    held_out = write(directory / "b.jsonl", [{"text": document(n)} for n in (3, 4, 100, 101)])
    return wanted(texts(directory / "a.jsonl"), held_out=(held_out,))


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (refuse_empty, "TC-520", "holds no text"),
        (refuse_missing, "TC-520", "does not exist"),
        (refuse_none, "TC-192", "no training data"),
        (refuse_line, "TC-521", "a.jsonl:2"),
        (refuse_record, "TC-521", "a.jsonl:2"),
        (refuse_bytes, "TC-521", "not UTF-8"),
        (refuse_short, "TC-192", f"needs {64 * 4 * 64}"),
        (refuse_one_document, "TC-192", "1 distinct training documents cannot be divided"),
        (refuse_ids, "TC-193", "token 400, the model's embedding ends at 319"),
        (refuse_words_as_ids, "TC-521", "a.jsonl:1"),
        (refuse_other_tokenizer, "TC-193", "a.jsonl:"),
        (refuse_trained_on, "TC-194", "also stands in the training text"),
    ],
)
def test_refused(model: Path, tmp_path: Path, make: Callable[[Path], Training], code: str, says: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        load_sequences(make(tmp_path), model)
    assert caught.value.code == code and says in caught.value.message
    assert caught.value.hint


def test_boilerplate_of_all_documents_is_no_copy(model: Path, tmp_path: Path) -> None:
    head = "You are a helpful assistant who answers in one sentence. " * 3
    train = write(tmp_path / "a.jsonl", [{"text": head + document(n)} for n in range(60)])
    held_out = write(tmp_path / "b.jsonl", [{"text": head + document(n)} for n in range(100, 104)])
    load_sequences(wanted(train, held_out=(held_out,)), model)


def test_a_tokenizer_with_more_ids_than_the_embedding(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(ToolchainError, match="ends at 199") as caught:
        load_sequences(wanted(texts(tmp_path / "a.jsonl")), other)
    assert caught.value.code == "TC-193"


def test_no_tokenizer_and_no_template(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(model, other)
    (other / "tokenizer.json").unlink()
    source = texts(tmp_path / "a.jsonl")
    with pytest.raises(ToolchainError) as caught:
        load_sequences(wanted(source), other)
    assert caught.value.code == "TC-207"
    shutil.copy(model / "tokenizer.json", other)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ToolchainError) as caught:
        load_sequences(replace(wanted(source), chat_template=True), other)
    assert caught.value.code == "TC-205"
