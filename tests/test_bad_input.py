"""Bad input: one clear error each, the right exit status, nothing half-written. And odd input that must work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Made, Ran
from tests.tiny import make_tiny, write_tokenizer

Run = Callable[..., Ran]
Tiny = Callable[[str], Path]
Fault = Callable[[Path], None]


def refused(ran: Ran, *, status: int, code: str, words: str = "") -> dict[str, Any]:
    """The one error on stdout as JSON, complete."""
    assert ran.status == status, (ran.status, ran.out, ran.err)
    assert "Traceback" not in ran.err
    error: dict[str, Any] = ran.json["error"]
    assert error["code"] == code, error
    assert words in json.dumps(error), error
    assert len(error["message"]) < 800, "one error, not a page"
    return error


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: whatever is left there was written by the command."""
    directory = tmp_path / "place"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def nothing_left(place: Path) -> Callable[[], None]:
    def check() -> None:
        left = [str(path.relative_to(place)) for path in place.rglob("*")]
        assert left == [] or left == ["engines"] or left == ["triton_repo"], left

    return check


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a tiny model, to damage."""
    return Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def no_directory(model: Path) -> None:
    shutil.rmtree(model)


def empty_directory(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()


def truncated_shard(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def broken_header(model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] = ord("x")
    path.write_bytes(data)


def no_architectures(model: Path) -> None:
    edit_config(model, architectures=None)


def config_is_cut_off(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text()[:100])


def config_is_not_text(model: Path) -> None:
    (model / "config.json").write_bytes(b"\xff\xfe\x00")


def no_hidden_size(model: Path) -> None:
    edit_config(model, hidden_size=None)


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def unknown_architecture(model: Path) -> None:
    from safetensors.torch import save_file

    edit_config(model, architectures=["TotallyNewForCausalLM"], model_type="totally_new")
    save_file(
        {"a.b": torch.zeros(2, 2), "c.d": torch.zeros(4)}, model / "model.safetensors", {"format": "pt"}
    )


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def tokenizer_is_cut_off(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text()[:2000])


def config_of_another_model(model: Path) -> None:
    edit_config(model, num_hidden_layers=3)


def foreign_tokenizer(model: Path) -> None:
    """A vocabulary beyond the embedding: ids that the model does not have."""
    path = model / "tokenizer.json"
    value = json.loads(path.read_text())
    special = len(value["added_tokens"])
    vocabulary = value["model"]["vocab"]
    shifted = {token: index if index < special else index + 200 for token, index in vocabulary.items()}
    value["model"]["vocab"] = shifted
    path.write_text(json.dumps(value))


PLANNED: list[tuple[Fault, int, str, str]] = [
    (no_directory, 2, "TC-010", "no directory"),
    (empty_directory, 2, "TC-012", "empty"),
    (truncated_shard, 1, "TC-015", "1000 are missing"),
    (broken_header, 1, "TC-016", "model.safetensors"),
    (no_architectures, 2, "TC-014", "architectures"),
    (config_is_cut_off, 1, "TC-003", "line"),
    (config_is_not_text, 1, "TC-003", "UTF-8"),
    (no_hidden_size, 2, "TC-022", "hidden_size"),
    (only_pickles, 2, "TC-018", "pytorch_model.bin"),
    (unknown_architecture, 2, "TC-020", "TotallyNew"),
]
QUANTIZED: list[tuple[Fault, int, str, str]] = [
    (no_tokenizer, 2, "TC-207", "tokenizer"),
    (broken_tokenizer, 2, "TC-207", "tokenizer"),
    (tokenizer_is_cut_off, 2, "TC-207", "tokenizer"),
    (foreign_tokenizer, 2, "TC-207", "vocab_size 320"),
    (config_of_another_model, 1, "TC-304", "layers.2"),
]


@pytest.mark.parametrize(("fault", "status", "code", "words"), PLANNED)
@pytest.mark.parametrize("command", ["plan", "engine"])
def test_models_that_cannot_be_planned(
    toolchain: Run, model: Path, nothing_left: Callable[[], None], command: str, fault: Fault, status: int, code: str,
    words: str,
) -> None:  # fmt: skip
    fault(model)
    refused(toolchain(command, model, "--format", "nvfp4", "--json"), status=status, code=code, words=words)
    nothing_left()


@pytest.mark.parametrize(("fault", "status", "code", "words"), QUANTIZED)
@pytest.mark.parametrize("command", [("quantize", "--output", "engines/out"), ("engine",)])
def test_models_that_cannot_be_quantized(
    toolchain: Run, made: Made, model: Path, nothing_left: Callable[[], None], command: tuple[str, ...], fault: Fault,
    status: int, code: str, words: str,
) -> None:  # fmt: skip
    fault(model)
    data = ("--calib-data", made.texts, "--calib-samples", 2, "--calib-length", 32)
    ran = toolchain(command[0], model, *command[1:], "--format", "fp8", *data, "--json")
    refused(ran, status=status, code=code, words=words)
    nothing_left()


H100 = ("--gpu", "h100", "--target", "trtllm")


@pytest.mark.parametrize(
    ("options", "status", "code", "words"),
    [
        (["--format", "fp9"], 2, "TC-101", "nvfp4"),
        (["--format", "fp8", "--gpu", "h9000"], 2, "TC-102", "h100"),
        (["--format", "fp8", "--target", "cpp"], 2, "TC-103", "trtllm"),
        (["--format", "fp8", "--policy", "all"], 2, "TC-104", "experts-only"),
        (["--format", "fp8", "--kv-cache", "int3"], 2, "TC-107", "fp8"),
        (["--format", "fp8", "--trtllm-version", "one"], 2, "TC-106", "one"),
        (["--format", "nvfp4", *H100, "--trtllm-version", "1.2.1"], 2, "TC-100", "TC-120"),
        (["--format", "fp8", *H100, "--tp", "3"], 2, "TC-100", "TC-112"),
        (["--format", "fp8", "--tp", "0"], 2, "TC-100", "--tp is 0"),
        (["--format", "fp8", "--max-batch-size", "0"], 2, "TC-100", "--max-batch-size is 0"),
        (["--format", "fp8", "--max-seq-len", "-4"], 2, "TC-100", "--max-seq-len is -4"),
        (["--format", "fp8", "--max-seq-len", "100000"], 2, "TC-100", "TC-131"),
        (["--format", "fp8", "--calib-samples", "0"], 2, "TC-007", "--calib-samples is 0"),
        (["--format", "fp8", "--calib-length", "-1"], 2, "TC-007", "--calib-length is -1"),
        (["--format", "fp8", "--seed", "-1"], 2, "TC-007", "--seed is -1"),
        (["--format", "fp8", "--eval-tokens", "0"], 2, "TC-007", "--eval-tokens is 0"),
        (["--format", "fp8", "--eval-data", "absent.jsonl"], 2, "TC-520", "absent.jsonl"),
        (["--format", "fp8", "--calib-data", "absent.jsonl"], 2, "TC-204", "absent.jsonl"),
        (["--format", "fp8", "--calib-data", "./absent"], 2, "TC-204", "absent"),
        (["--format", "fp8"], 2, "TC-204", "--calib-data"),
        (["--format", "fp8", "--device", "cuda:99"], 2, "TC-507", "cuda:99"),
        (["--format", "fp8", "--device", "gpu"], 2, "TC-507", "gpu"),
        (["--format", "fp8", "--device", "meta"], 2, "TC-507", "meta"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met(
    toolchain: Run, made: Made, tiny: Tiny, nothing_left: Callable[[], None], options: list[str], status: int,
    code: str, words: str,
) -> None:  # fmt: skip
    if "--device" in options:
        options = [*options, "--calib-data", str(made.texts), "--calib-length", "32"]
    ran = toolchain("engine", tiny("qwen3_moe"), *options, "--json")
    refused(ran, status=status, code=code, words=words)
    nothing_left()


def test_int4_awq_needs_whole_groups(
    toolchain: Run, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    narrow = make_tiny("qwen3_moe", tmp_path / "narrow", moe_intermediate_size=96)
    ran = toolchain("engine", narrow, "--format", "int4_awq", "--json")
    error = refused(ran, status=2, code="TC-100", words="TC-110")
    assert "96" in json.dumps(error["findings"])
    nothing_left()


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"\xff\xfe not UTF-8", "TC-521", "UTF-8"),
        (b"", "TC-520", "no text"),
        (b'{"text": "fine"}\n{"text": 3}\n', "TC-521", ":2"),
        (b'{"text": "fine"}\nnot json\n', "TC-521", ":2"),
        (b'{"text": "few"}\n', "TC-204", "one sample needs 64"),
    ],
)
def test_calibration_text_with_a_fault(
    toolchain: Run,
    tiny: Tiny,
    tmp_path: Path,
    nothing_left: Callable[[], None],
    content: bytes,
    code: str,
    words: str,
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    given = (
        "engine",
        tiny("qwen3_moe"),
        "--format",
        "fp8",
        "--calib-data",
        data,
        "--calib-length",
        64,
        "--json",
    )
    ran = toolchain(*given)
    refused(ran, status=1 if code == "TC-521" else 2, code=code, words=words)
    nothing_left()


def test_a_chat_template_that_is_not_there(toolchain: Run, made: Made, model: Path, place: Path) -> None:
    path = model / "tokenizer_config.json"
    value = json.loads(path.read_text())
    del value["chat_template"]
    path.write_text(json.dumps(value))
    given = (
        "quantize",
        model,
        "--format",
        "fp8",
        "--output",
        "out",
        "--calib-data",
        made.texts,
        "--chat-template",
    )
    refused(toolchain(*given, "--json"), status=2, code="TC-205", words="chat template")
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--max-tokens", "0", "--data", "DATA"], "TC-523", "0 tokens"),
        (["--window", "0", "--data", "DATA"], "TC-523", "window 0"),
        (["--data", "absent.txt"], "TC-520", "absent.txt"),
        ([], "TC-520", "--data"),
        (["--data", "EMPTY"], "TC-520", "no text"),
        (["--data", "DATA", "--device", "cuda:99"], "TC-507", "cuda:99"),
        (["--data", "DATA", "--baseline", "absent"], "TC-010", "absent"),
    ],
)
def test_evaluations_that_cannot_be_made(
    toolchain: Run, made: Made, place: Path, arguments: list[str], code: str, words: str
) -> None:
    empty = place.parent / "empty.txt"
    empty.touch()
    names = {"DATA": str(made.texts), "EMPTY": str(empty)}
    ran = toolchain("evaluate", made.engine, *(names.get(word, word) for word in arguments), "--json")
    refused(ran, status=2, code=code, words=words)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--max-tokens", "0"], "TC-501", "max_tokens 0"),
        (["--temperature", "-1"], "TC-501", "temperature"),
        (["--top-p", "2", "--top-k", "-1"], "TC-501", "top_k"),
        (["--stop", ""], "TC-501", "stop"),
        (["--device", "cuda:99"], "TC-507", "cuda:99"),
        (["--prompt", ""], "TC-503", "empty"),
        (["--prompt", "x" * 600], "TC-503", "max_seq_len"),
        (["--prompt", "\udcff"], "TC-503", "UTF-8"),
    ],
)
def test_generations_that_cannot_be_made(
    toolchain: Run, made: Made, arguments: list[str], code: str, words: str
) -> None:
    ran = toolchain("generate", made.engine, "--prompt", "def ", *arguments, "--json")
    refused(ran, status=2, code=code, words=words)


@pytest.mark.parametrize("concurrency", ["0", "-1", "1,0", "two", "", "1,,2"])
def test_benchmarks_are_refused_before_a_server_starts(
    toolchain: Run, made: Made, nothing_left: Callable[[], None], concurrency: str
) -> None:
    ran = toolchain("bench", made.engine, "--concurrency", concurrency, "--json")
    assert refused(ran, status=2, code=ran.json["error"]["code"], words="concurrency")["code"] in (
        "TC-701",
        "TC-009",
    )
    nothing_left()


def test_a_result_is_not_overwritten(toolchain: Run, made: Made, place: Path) -> None:
    (place / "old.json").write_text("{}")
    ran = toolchain("bench", made.engine, "--output", "old.json", "--json")
    refused(ran, status=2, code="TC-004", words="--force")
    assert (place / "old.json").read_text() == "{}"


COMMANDS_OF_ENGINES = {
    "generate": ("generate", "ENGINE", "--prompt", "x"),
    "triton": ("triton", "ENGINE"),
    "serve": ("serve", "ENGINE"),
    "bench": ("bench", "ENGINE"),
    "verify": ("verify", "ENGINE"),
    "evaluate": ("evaluate", "ENGINE", "--data", "DATA"),
    "build": ("build", "ENGINE", "--output", "engines/out"),
}


@pytest.mark.parametrize("command", COMMANDS_OF_ENGINES)
@pytest.mark.parametrize("state", ["unfinished", "absent", "empty", "damaged"])
def test_directories_that_are_no_engines(
    toolchain: Run, made: Made, tmp_path: Path, nothing_left: Callable[[], None], command: str, state: str
) -> None:
    engine = tmp_path / "engine"
    if state in ("unfinished", "damaged"):
        shutil.copytree(made.engine, engine)
        (engine / "engine.json").unlink()
    if state == "damaged":
        (engine / "engine.json").write_text('{"name": "cut o')
    if state == "empty":
        engine.mkdir()
    words = {"ENGINE": str(engine), "DATA": str(made.texts)}
    ran = toolchain(*(words.get(word, word) for word in COMMANDS_OF_ENGINES[command]), "--json")
    codes = {"damaged": ("TC-003",)}.get(state, ("TC-502", "TC-611", "TC-009"))
    error = refused(ran, status=ran.status, code=ran.json["error"]["code"], words="engine")
    assert ran.status in (1, 2) and error["code"] in codes
    nothing_left()


def test_occupied_outputs(toolchain: Run, made: Made, place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    (place / "file").write_text("mine")
    data = ("--calib-data", made.texts, "--calib-samples", 2, "--calib-length", 32)
    for name, words in (("out", "not empty"), ("file", "is a file")):
        for command in (
            ("quantize", made.source, "--format", "fp8", *data, "--output", name),
            ("engine", made.source, "--format", "fp8", *data, "--output", name),
            ("build", made.engine, "--output", name),
            ("triton", made.engine, "--output", name),
            ("demo", "--output", name),
            ("quantize", made.source, "--format", "fp8", *data, "--output", name, "--dry-run"),
            ("demo", "--output", name, "--dry-run"),
        ):
            refused(toolchain(*command, "--json"), status=2, code="TC-004", words=words)
    assert sorted(path.name for path in place.rglob("*")) == ["file", "notes.txt", "out"]
    assert (place / "out" / "notes.txt").read_text() == (place / "file").read_text() == "mine"


def test_force_replaces_an_occupied_output_only_when_all_is_written(
    toolchain: Run, made: Made, place: Path
) -> None:
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    given = (
        "quantize",
        made.source,
        "--format",
        "fp8",
        "--output",
        "out",
        "--calib-length",
        32,
        "--force",
        "--json",
    )
    refused(toolchain(*given, "--calib-data", "absent.txt"), status=2, code="TC-204")
    assert (place / "out" / "notes.txt").read_text() == "mine"
    assert toolchain(*given, "--calib-data", made.texts, "--calib-samples", 2).status == 0
    assert (place / "out" / "config.json").is_file() and not (place / "out" / "notes.txt").exists()


@pytest.mark.parametrize("command", ["quantize", "engine"])
def test_a_disk_that_is_too_small(
    toolchain: Run, made: Made, place: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    usage = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    given = (command, made.source, "--format", "fp8", "--calib-data", made.texts, "--output", "out", "--json")
    refused(toolchain(*given), status=1, code="TC-005", words="free")
    assert not list(place.iterdir())


def test_a_disk_that_fills_up_while_writing(made: Made, place: Path) -> None:
    """The limit on file sizes stands for it: writing the shard fails half-way, in the real command."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
        "from toolchain.cli.main import main; main(sys.argv[1:])"
    )
    given = [
        "quantize",
        str(made.source),
        "--format",
        "fp8",
        "--calib-data",
        str(made.texts),
        "--calib-samples",
        "2",
    ]
    command = [sys.executable, "-c", script, *given, "--calib-length", "32", "--output", "out", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    error = refused(Ran(status=done.returncode, out=done.stdout, err=done.stderr), status=1, code="TC-002")
    assert "large" in error["message"]
    assert not list(place.iterdir())


@pytest.mark.parametrize("command", ["quantize", "engine", "build", "triton", "bench"])
def test_outputs_that_cannot_be_written(
    toolchain: Run, made: Made, place: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    usage = shutil.disk_usage(place)  # of the tests' disk: /sys has no space at all, which is another error
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    locked = place / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    where = Path("/sys/toolchain") if os.geteuid() == 0 else locked / "out"  # permissions do not stop root
    data = ("--format", "fp8", "--calib-data", made.texts, "--calib-samples", 2, "--calib-length", 32)
    given = {
        "quantize": (made.source, *data),
        "engine": (made.source, *data),
        "build": (made.engine,),
        "triton": (made.engine,),
        "bench": ("127.0.0.1:1", "--tokenizer", made.engine),
    }[command]
    ran = toolchain(command, *given, "--output", where, "--json")
    if command == "bench":
        refused(ran, status=1, code="TC-702")
    else:
        refused(ran, status=1, code="TC-002", words=str(where.parent))
    assert [path.name for path in place.rglob("*")] == ["locked"]


def test_a_hub_id_without_the_network(tmp_path: Path, place: Path, nothing_left: Callable[[], None]) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [
        str(Path(sys.executable).parent / "toolchain"),
        "engine",
        "owner/model",
        "--format",
        "nvfp4",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    ran = Ran(status=done.returncode, out=done.stdout, err=done.stderr)
    refused(ran, status=1, code="TC-019", words="HF_HUB_OFFLINE")
    nothing_left()


def whole_way(toolchain: Run, model: Path, texts: Path, format_name: str) -> Ran:
    """quantize, verify, evaluate and generate; the last answer."""
    data = ("--calib-data", texts, "--calib-samples", 4, "--calib-length", 32, "--policy", "all-linear")
    for command in (
        ("quantize", model, "--format", format_name, *data, "--output", "out"),
        ("verify", "out", "--against", model),
        ("evaluate", "out", "--baseline", model, "--data", texts, "--max-tokens", 128, "--window", 64),
        ("build", "out", "--output", "engines/built"),
        ("engine", model, "--format", format_name, *data, "--eval-data", texts, "--eval-tokens", 128),
    ):
        ran = toolchain(*command, "--json")
        assert ran.status == 0, (command, ran.out, ran.err)
    return toolchain("generate", "built", "--prompt", "def f", "--max-tokens", 4, "--json")


@pytest.mark.parametrize("format_name", ["fp8", "nvfp4", "int4_awq"])
def test_tied_embeddings_go_the_whole_way(
    toolchain: Run, made: Made, tmp_path: Path, place: Path, format_name: str
) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "tied", tie_word_embeddings=True)
    ran = whole_way(toolchain, model, made.texts, format_name)
    assert ran.status == 0 and len(ran.json["token_ids"]) == 4
    excluded = json.loads(Path("out/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert "lm_head" in excluded, "a runtime builds one, and must not quantize it"


def test_a_sharded_source_goes_the_whole_way(
    toolchain: Run, made: Made, tiny: Tiny, tmp_path: Path, place: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).save_pretrained(model, max_shard_size="200KB")
    write_tokenizer(model)
    assert len(list(model.glob("*.safetensors"))) > 3
    ran = whole_way(toolchain, model, made.texts, "nvfp4")
    whole = toolchain("quantize", tiny("qwen3_moe"), "--format", "nvfp4", "--policy", "all-linear", "--calib-data",
                      made.texts, "--calib-samples", 4, "--calib-length", 32, "--output", "whole")  # fmt: skip
    assert ran.status == whole.status == 0

    from safetensors.torch import load_file

    one, other = load_file("out/model.safetensors"), load_file("whole/model.safetensors")
    assert one.keys() == other.keys()
    assert all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
        if one[name].dim()
    )


def test_a_missing_shard(
    toolchain: Run, tiny: Tiny, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    from transformers import AutoModelForCausalLM

    model = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).save_pretrained(model, max_shard_size="200KB")
    sorted(model.glob("*.safetensors"))[1].unlink()
    refused(toolchain("engine", model, "--format", "fp8", "--json"), status=1, code="TC-017", words="missing")
    nothing_left()
