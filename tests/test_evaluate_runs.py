"""Evaluations that are interrupted, answers side by side, where text comes from, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Ran
from tests.tiny import make_tiny
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Silent
from toolchain.evaluate.answers import first_difference
from toolchain.evaluate.checkpoint import evaluate_checkpoint
from toolchain.evaluate.state import State
from toolchain.evaluate.tokens import encode_sources
from toolchain.modeling.loading import load_checkpoint

Tiny = Callable[[str], Path]
Run = Callable[..., Ran]
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(100))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("other") / "model", seed=1)


class Interrupted(Silent):
    """Ends the run after some batches, as Ctrl-C does; remembers what was said."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.notes, self.batches = after, [], 0  # type: ignore[var-annotated]

    def note(self, text: str) -> None:
        self.notes.append(text)

    def track(self, items: Iterable[Any], *, description: str, total: int | None = None) -> Iterator[Any]:
        for item in items:
            if self.batches == self.after:
                raise KeyboardInterrupt
            yield item
            self.batches += 1


@pytest.fixture
def evaluate(other: Path, tiny: Tiny, text: Path) -> Callable[..., dict[str, Any]]:
    def run(**options: Any) -> dict[str, Any]:
        settings = {
            "data": text,
            "max_tokens": 640,
            "window": 16,
            "device": "cpu",
            "generations": 1,
            **options,
        }
        return evaluate_checkpoint(other, baseline=tiny("qwen3_moe"), **settings)

    return run


def test_an_interrupted_run_goes_on_and_gives_the_same_report(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    whole = evaluate()
    for after in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            evaluate(state=state, progress=Interrupted(after))
    assert len(list(state.glob("batch-*.safetensors"))) == 3
    rest = Interrupted()
    assert evaluate(state=state, progress=rest) == whole
    assert rest.batches == 2  # 40 windows in batches of 8
    assert any("after 3 of 5 batches" in note for note in rest.notes)
    assert not any("generating" in note for note in rest.notes)
    assert not state.exists()


def test_a_killed_process_goes_on_and_gives_the_same_report(
    evaluate: Callable[..., dict[str, Any]], other: Path, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    state, output = tmp_path / "state", tmp_path / "report.json"
    program = Path(sys.executable).parent / "toolchain"
    command: list[object] = [program, "evaluate", other, "--baseline", tiny("qwen3_moe")]
    command += ["--data", text, "--max-tokens", "3000", "--window", "4", "--device", "cpu"]
    command += ["--generations", "1", "--state", state, "--output", output]
    # How a sum is split over threads decides how it is rounded.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [str(word) for word in command]
    killed = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (state / "batch-000002.safetensors").exists() and time.monotonic() < end:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not output.exists()
    rest = Interrupted()
    options = {"max_tokens": 3000, "window": 4}
    resumed = evaluate(**options, state=state, progress=rest)
    assert 3 <= 94 - rest.batches < 94
    assert resumed == evaluate(**options)


def test_changed_settings_are_named_and_the_run_begins_anew(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        evaluate(state=state, progress=Interrupted(2))
    rest = Interrupted()
    report = evaluate(state=state, window=32, progress=rest)
    assert report == evaluate(window=32)
    (note,) = [note for note in rest.notes if "other settings" in note]
    assert "window changed from 16 to 32" in note and "token_hash changed" in note


@pytest.mark.parametrize("damaged", ["batch-000001.safetensors", "settings.json", "generations.json"])
def test_a_damaged_state_is_one_clear_error(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, damaged: str
) -> None:
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        evaluate(state=state, progress=Interrupted(3))
    (state / damaged).write_bytes((state / damaged).read_bytes()[:-7])
    with pytest.raises(ToolchainError, match=damaged) as error:
        evaluate(state=state)
    assert error.value.code == "TC-526" and "remove" in error.value.hint
    assert len(list(state.iterdir())) == 5


def test_a_state_directory_with_other_files_is_left_alone(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ToolchainError, match=r"thesis\.txt") as error:
        evaluate(state=tmp_path)
    assert error.value.code == "TC-526"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ToolchainError, match="it is a file"):
        evaluate(state=tmp_path / "thesis.txt")


def test_two_runs_do_not_share_a_state(tmp_path: Path) -> None:
    with State(tmp_path / "state", {"window": 16}, Silent()), pytest.raises(ToolchainError) as error:
        State(tmp_path / "state", {"window": 16}, Silent()).__enter__()
    assert error.value.code == "TC-008"
    assert not (tmp_path / "state").exists(), "nothing was finished"


def test_answers_are_those_that_transformers_generates(
    evaluate: Callable[..., dict[str, Any]], other: Path, tiny: Tiny, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def main():\n\nimport os\nclass A\n")
    report = evaluate(prompts=prompts, generations=None)
    tokenizer = AutoTokenizer.from_pretrained(other)
    models = [load_checkpoint(path, device=torch.device("cpu")) for path in (other, tiny("qwen3_moe"))]
    assert [answer["prompt"] for answer in report["generations"]] == ["def main():", "import os", "class A"]
    for answer in report["generations"]:
        ids = tokenizer(answer["prompt"], return_tensors="pt").input_ids
        mine, theirs = (
            model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :].tolist()
            for model in models
        )
        assert answer["quantized"] == tokenizer.decode(mine)
        assert answer["baseline"] == tokenizer.decode(theirs)
        assert answer["tokens"] == max(len(mine), len(theirs))
        index = answer["first_difference"]
        assert mine[:index] == theirs[:index] and mine[index : index + 1] != theirs[index : index + 1]
    again = evaluate(prompts=["def main():", "import os", "class A"], generations=2)
    assert again["generations"] == report["generations"][:2]


def test_prompts_are_taken_from_the_text_or_from_conversations(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = evaluate(generations=4)
    found = [answer["prompt"] for answer in report["generations"]]
    last = len(TEXT) - 16
    assert found == [TEXT[at : at + 16] for at in (index * last // 39 for index in (0, 13, 26, 39))]
    chats = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": "why?"}]}, {"text": "def f("}]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [answer["prompt"] for answer in evaluate(prompts=chats)["generations"]]
    assert found == ["<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"]
    assert evaluate(generations=0)["generations"] == []


@pytest.mark.parametrize(
    ("mine", "theirs", "index"),
    [
        ([1, 2], [1, 2], None),
        ([], [], None),
        ([3, 2], [1, 2], 0),
        ([1, 2, 4], [1, 2, 3], 2),
        ([1], [1, 2], 1),
    ],
)
def test_the_first_difference(mine: list[int], theirs: list[int], index: int | None) -> None:
    assert first_difference(mine, theirs) == index


def test_parquet_and_several_sources(tiny: Tiny, tmp_path: Path) -> None:
    """One byte is one token; each source gives an equal share of whole windows."""
    import datasets
    from transformers import AutoTokenizer

    datasets.Dataset.from_dict({"text": ["a" * 100, "b" * 100]}).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "c.txt").write_text("c" * 100)
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    sources = [tmp_path / "rows.parquet", str(tmp_path / "c.txt")]
    tokens = encode_sources(tokenizer, sources, max_tokens=60, window=10)
    assert tokenizer.decode(tokens) == "a" * 15 + "</s>" + "b" * 14 + "c" * 30
    whole = encode_sources(tokenizer, [tmp_path], max_tokens=10_000, window=10)
    assert tokenizer.decode(whole) == "c" * 100 + "</s>" + "a" * 100 + "</s>" + "b" * 100
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ToolchainError, match=r"bad\.parquet") as error:
        encode_sources(tokenizer, [tmp_path / "bad.parquet"], max_tokens=60, window=10)
    assert error.value.code == "TC-521"


def test_names_on_the_hub_are_asked_for(
    evaluate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ToolchainError, match=r"nobody/nothing-like-this.*hub") as error:
        evaluate(data="nobody/nothing-like-this:config")
    assert error.value.code == "TC-524"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"window": 1}, "TC-523", "window 1"),
        ({"stride": 17}, "TC-523", "stride 17"),
        ({"stride": -1}, "TC-523", "stride -1"),
        ({"max_tokens": 1}, "TC-523", "1 tokens"),
        ({"data": ["x"]}, "TC-520", "x does not exist"),
        ({"emulation": "gpu"}, "TC-523", "gpu"),
        ({"generations": -1}, "TC-523", "-1 prompts"),
        ({"prompts": []}, "TC-528", "no prompt"),
        ({"prompts": [""]}, "TC-528", "empty prompt"),
        ({"prompts": ["x" * 600]}, "TC-503", "600 tokens"),
    ],
)
def test_requests_that_are_refused(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, options: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as error:
        evaluate(state=tmp_path / "state", **options)
    assert error.value.code == code
    assert not (tmp_path / "state").exists()


def test_other_vocabularies_and_broken_models_are_refused(
    tiny: Tiny, tmp_path: Path, text: Path, toolchain: Run
) -> None:
    source = tiny("llama")
    small = make_tiny("llama", tmp_path / "small", vocab_size=300)
    options: dict[str, Any] = {"data": text, "max_tokens": 64, "window": 16, "device": "cpu"}
    with pytest.raises(UsageError, match="320 and 300") as error:
        evaluate_checkpoint(source, baseline=small, **options)
    assert error.value.code == "TC-522"
    tiniest = make_tiny("llama", tmp_path / "tiniest", vocab_size=100)
    with pytest.raises(UsageError, match="embedding ends at 99") as error:
        evaluate_checkpoint(tiniest, baseline=None, **options)
    assert error.value.code == "TC-207"
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][7] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    words = ("--baseline", source, "--data", text, "--max-tokens", 64, "--window", 16, "--json")
    ran = toolchain("evaluate", broken, *words, "--generations", 0, "--output", tmp_path / "report.json")
    assert ran.status == 1 and ran.json["error"]["code"] == "TC-527"
    assert not (tmp_path / "report.json").exists()


def test_the_command_prints_a_table_and_writes_the_report(
    other: Path, tiny: Tiny, text: Path, tmp_path: Path, toolchain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "report.json"
    words = ("evaluate", other, "--baseline", tiny("qwen3_moe"), "--data", text, "--max-tokens", 128)
    words += ("--window", 32, "--stride", 16, "--generations", 1, "--output", output)
    ran = toolchain(*words)
    assert ran.status == 0
    report = json.loads(output.read_text())
    assert report["schema_version"] == 2 and report["data"]["stride"] == 16
    for said in (f"{report['ppl']:.4f}", f"{report['router_agreement']:.2%}", "95 % interval", "load shift"):
        assert said in ran.out
    assert "windows of 32, one every 16" in ran.out and "greedy answers" in ran.out
    assert list((tmp_path / "cache" / "toolchain" / "evaluate").iterdir()) == []
    refused = toolchain(*words, "--json")
    assert refused.status == 2 and refused.json["error"]["code"] == "TC-004"
    assert json.loads(output.read_text()) == report
    again = toolchain(*words, "--force", "--json")
    assert again.status == 0 and again.json == report
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    alone = toolchain("evaluate", other, "--data", text, "--max-tokens", 128, "--window", 32, "--json")
    assert alone.status == 0 and "cannot be continued" in alone.err
    assert "kl_mean" not in alone.json
    assert alone.json["ppl"] == pytest.approx(report["ppl"], rel=0.2)
