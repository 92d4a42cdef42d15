"""`toolchain engine` and `toolchain build` on a tiny model, judged by the files that they leave."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from tests.conftest import Made, Ran
from toolchain.checkpoint.audit import audit
from toolchain.triton.lint import lint_repository

Run = Callable[..., Ran]
ROOT = Path(__file__).resolve().parent.parent
STAGES = ("quantize", "plan", "verify", "evaluate", "build", "sbom", "report", "triton")
LATER = ("engine.json", "sbom.cdx.json", "gates.json")
"""What engine.json does not describe: itself, and what is made of it."""
AFTER = {"sbom", "report", "triton"}
"""Stages that follow from engine.json."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(directory: Path) -> dict[str, str]:
    """Every file that is not hidden, with its hash."""
    return {
        str(path.relative_to(directory)): sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }


def described(engine: Path) -> dict[str, str]:
    """The files that engine.json has to describe: all but itself, what is made of it and the records of the stages."""
    files = tree(engine)
    return {
        name: digest
        for name, digest in files.items()
        if name not in LATER and not name.startswith(("stages/", "report/"))
    }


def said(ran: Ran) -> dict[str, str]:
    """Stage -> what it said."""
    return dict(re.findall(rf"^({'|'.join(STAGES)}): (.*)$", ran.err, re.MULTILINE))


def reran(ran: Ran) -> set[str]:
    return {stage for stage, words in said(ran).items() if words != "unchanged, skipped"}


@pytest.fixture
def mine(made: Made, tmp_path: Path) -> Made:
    """A copy of the engine, its source, its texts and its repository, to change."""
    return made.copy_to(tmp_path)


@pytest.fixture
def settled(mine: Made, toolchain: Run) -> Made:
    """``mine`` after a run: its paths are those of the copy."""
    ran = toolchain(*mine.command)
    assert ran.status == 0, ran.err
    return mine


def test_the_whole_picture(made: Made) -> None:
    engine = made.engine
    for name in ("plan.json", "engine.json", "verify.json", "metrics.json"):
        assert json.loads((engine / name).read_text()), name
    assert json.loads((engine / "verify.json").read_text())["passed"]
    assert audit(engine / "checkpoint", against=made.source).passed
    assert json.loads((engine / "metrics.json").read_text())["ppl"] > 1
    assert lint_repository(made.repository) == []
    assert not [path for path in made.root.rglob(".*") if path.name != ".lock"], "left-overs"


def test_the_engine_generates(made: Made, toolchain: Run) -> None:
    ran = toolchain("generate", made.engine, "--prompt", "def f1(x):", "--max-tokens", 5, "--json")
    assert ran.status == 0 and len(ran.json["token_ids"]) == 5
    assert (
        toolchain("generate", made.engine, "--prompt", "def f1(x):", "--max-tokens", 5).out
        == ran.json["text"] + "\n"
    )


def test_the_manifest_tells_what_made_the_engine(made: Made) -> None:
    from transformers import AutoTokenizer

    manifest = json.loads((made.engine / "engine.json").read_text())
    assert manifest["files"] == described(made.engine)
    assert manifest["inputs"] == {
        "model": {
            path.name: sha256(path) for path in made.source.iterdir() if path.name != "evaluation.jsonl"
        },
        "calibration": sha256(made.texts),
        "evaluation": sha256(made.source / "evaluation.jsonl"),
    }
    text = made.texts.read_text()
    tokens = AutoTokenizer.from_pretrained(made.source)(text, add_special_tokens=False).input_ids
    quantized = manifest["stages"]["quantize"]
    expected = {
        "source": str(made.texts),
        "samples": 8,
        "length_tokens": 64,
        "seed": 0,
        "sampling": "random",
        "documents": 1,
        "duplicates_dropped": 0,
        "template_sha256": None,
        "tokens_sha256": hashlib.sha256(
            b"".join(token.to_bytes(8, "little") for token in tokens[:512])
        ).hexdigest(),
    }
    assert quantized["facts"]["calibration"] == expected
    for stage in STAGES[: STAGES.index("sbom")]:
        assert (
            manifest["stages"][stage]["seconds"] >= 0
            and manifest["stages"][stage]["peak_memory_bytes"] > 10**8
        )
    assert quantized["seconds"] > 0 and quantized["settings"]["calibration.seed"] == 0
    for package in ("torch", "transformers", "nvidia-modelopt", "safetensors", "tokenizers", "toolchain"):
        assert manifest["versions"][package] == version(package)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert manifest["git_commit"].removesuffix("+changes") == head
    assert manifest["command"] == ["toolchain", *map(str, made.command)]
    metrics = json.loads((made.engine / "metrics.json").read_text())
    assert manifest["metrics"]["kl_mean"] == metrics["kl_mean"]
    assert manifest["metrics"].items() <= metrics.items(), "what it repeats is what was measured"
    plan = json.loads((made.engine / "plan.json").read_text())
    assert plan["model"] == str(made.source) and plan["model_identity"] == manifest["model"]["identity"]


def test_a_second_run_skips_every_stage_and_touches_nothing(settled: Made, toolchain: Run) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        paths = [*settled.engine.rglob("*"), *settled.repository.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths if path.name != ".lock"}

    before = state()
    ran = toolchain(*settled.command, "--json")
    assert ran.status == 0 and set(said(ran)) == set(STAGES) and reran(ran) == set()
    assert state() == before
    assert ran.json == json.loads((settled.engine / "engine.json").read_text())


@pytest.mark.parametrize(
    ("changed", "again", "named"),
    [
        (["--max-batch-size", "4"], {"plan", "build", *AFTER}, "serving.max_batch_size changed from 8 to 4"),
        (["--eval-tokens", "128"], {"evaluate", *AFTER}, "tokens changed from 256 to 128"),
        (["--seed", "1"], set(STAGES), "calibration.seed changed from 0 to 1"),
        (["--format", "fp8"], set(STAGES), "format changed from 'nvfp4' to 'fp8'"),
        (["--gpu", "b200", "--target", "trtllm"], {"plan", "verify", "build", *AFTER}, "target changed from 'local'"),
    ],
)  # fmt: skip
def test_a_changed_setting_is_named_and_only_what_depends_on_it_runs(
    settled: Made, toolchain: Run, changed: list[str], again: set[str], named: str
) -> None:
    ran = toolchain(*settled.command, *changed, "--json")
    assert ran.status == 0, ran.err
    assert reran(ran) == again and named in ran.err
    assert ran.json["files"] == described(settled.engine)
    plan = json.loads((settled.engine / "plan.json").read_text())
    assert (plan["format"], plan["target"]) == (ran.json["format"], ran.json["target"])
    assert reran(toolchain(*settled.command, *changed)) == set()


def change_weight(made: Made) -> None:
    flip_byte(made.source / "model.safetensors", 0)


def change_text(made: Made) -> None:
    made.texts.write_text(made.texts.read_text().replace("f1(", "g1("))


def change_evaluation(made: Made) -> None:
    text = "other " * 400
    (made.source / "evaluation.jsonl").write_text(json.dumps({"text": text}) + "\n")


def flip_byte(path: Path, from_end: int) -> None:
    """Of the mantissa of a stored number: the file stays a sound safetensors file."""
    data = bytearray(path.read_bytes())
    data[-2 - from_end] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (change_weight, "quantize: model file model.safetensors changed"),
        (change_text, "quantize: calibration.file changed"),
        (change_evaluation, "evaluate: data_file changed"),
    ],
)
def test_a_changed_input_is_noticed(
    settled: Made, toolchain: Run, change: Callable[[Made], None], first: str
) -> None:
    """Names and headers are the same: only the bytes differ."""
    change(settled)
    ran = toolchain(*settled.command, "--json")
    assert ran.status == 0 and first in ran.err, ran.err
    assert ran.json["files"] == described(settled.engine)
    assert ("quantize" in reran(ran)) == first.startswith("quantize")


@pytest.mark.parametrize(
    "victim", ["checkpoint/model.safetensors", "metrics.json", "plan.json", "engine.json"]
)
def test_a_tampered_file_is_redone(settled: Made, toolchain: Run, victim: str) -> None:
    before = tree(settled.engine)
    path = settled.engine / victim
    if path.suffix == ".safetensors":
        flip_byte(path, 0)
    elif victim == "engine.json":
        path.unlink()
    else:
        path.write_text("{}")
    ran = toolchain(*settled.command, "--json")
    assert ran.status == 0, ran.err
    stage = {"checkpoint/model.safetensors": "quantize", "metrics.json": "evaluate", "plan.json": "plan"}.get(
        victim
    )
    if stage:
        assert said(ran)[stage] == "its output was changed or removed, running again"
    after = tree(settled.engine)
    assert ran.json["files"] == described(settled.engine)
    same = ("checkpoint/model.safetensors", "plan.json", "verify.json")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_a_damaged_triton_repository_is_rendered_again(settled: Made, toolchain: Run) -> None:
    before = tree(settled.repository)
    (settled.repository / "tensorrt_llm" / "1" / "model.py").unlink()
    assert reran(toolchain(*settled.command)) == {"triton"}
    assert tree(settled.repository) == before


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (["--calib-data", "absent.txt"], "TC-204"),
        (["--calib-length", "100000"], "TC-204"),
        (["--eval-data", "absent.txt"], "TC-520"),
        (["--tp", "3"], "TC-100"),
        (["--format", "fp9"], "TC-101"),
    ],
)
def test_a_refused_request_leaves_the_finished_engine_as_it_was(
    settled: Made, toolchain: Run, wrong: list[str], code: str
) -> None:
    before = tree(settled.root)
    ran = toolchain(*settled.command, *wrong, "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == code
    assert tree(settled.root) == before
    assert reran(toolchain(*settled.command)) == set()


def test_a_failed_first_run_leaves_nothing(made: Made, toolchain: Run, tmp_path: Path) -> None:
    output, repository = tmp_path / "engine", tmp_path / "repository"
    where = ("--output", output, "--triton-output", repository)
    ran = toolchain("engine", made.source, "--format", "nvfp4", "--calib-data", "absent.txt", *where)
    assert ran.status == 2 and "absent.txt" in ran.err
    assert not output.exists() and not repository.exists()


def test_nothing_foreign_is_replaced(made: Made, toolchain: Run, tmp_path: Path) -> None:
    """`checkpoint` is a usual name, and a whole directory is replaced by the repository."""
    precious = tmp_path / "precious"
    (precious / "checkpoint").mkdir(parents=True)
    (precious / "checkpoint" / "thesis.txt").write_text("years of work")
    before = tree(precious)
    given = ("engine", made.source, "--format", "nvfp4", "--calib-data", made.texts)
    for where in (
        ("--output", precious, "--triton-output", tmp_path / "r"),
        ("--output", tmp_path / "e", "--triton-output", precious),
    ):
        ran = toolchain(*given, *where, "--json")
        assert ran.status == 2 and ran.json["error"]["code"] == "TC-004"
    for output in (made.source, made.source.parent):
        ran = toolchain("quantize", *given[1:], "--output", output, "--force", "--json")
        assert ran.status == 2 and ran.json["error"]["code"] == "TC-004"
    ran = toolchain("build", made.engine, "--output", made.engine, "--force", "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-004"
    assert tree(precious) == before and not (tmp_path / "e").exists() and not (tmp_path / "r").exists()


def test_a_dry_run_writes_nothing(
    made: Made, toolchain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(made.root)
    given = (made.source, "--format", "fp8", "--calib-data", made.texts)
    for command in (
        ("engine", *given),
        ("quantize", *given, "--output", "new"),
        ("build", made.engine, "--target", "trtllm", "--gpu", "b200", "--output", "new"),
        ("triton", made.engine),
        ("bench", made.engine),
    ):
        ran = toolchain(*command, "--dry-run", "--json")
        assert ran.status == 0 and ran.json, (command, ran.err)
    assert not list(tmp_path.iterdir()) and tree(made.root) == before


def test_two_runs_at_once(mine: Made, toolchain: Run) -> None:
    """The first one is the real command in a process of its own; it ends well."""
    shutil.rmtree(mine.engine)
    command = [str(Path(sys.executable).parent / "toolchain"), *map(str, mine.command), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        while "quantize: running" not in first.stderr.readline():
            assert first.poll() is None
        second = toolchain(*mine.command, "--json")
        out, err = first.communicate(timeout=120)
    assert second.status == 1 and second.json["error"]["code"] == "TC-008", second
    assert first.returncode == 0, err
    manifest = json.loads(out)
    assert manifest == json.loads((mine.engine / "engine.json").read_text())
    assert manifest["files"] == described(mine.engine)


def test_a_spec_stands_for_the_options(mine: Made, toolchain: Run, tmp_path: Path) -> None:
    spec = tmp_path / "mine.yaml"
    value = {"model": str(mine.source), "format": "nvfp4", "calib-data": str(mine.texts), "calib_samples": 8}
    spec.write_text(yaml.safe_dump({**value, "calib-length": 64, "eval_tokens": 256, "max-batch-size": 2}))
    where = ("--output", mine.engine, "--triton-output", mine.repository)
    ran = toolchain("engine", spec, *where, "--max-batch-size", 8, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["limits"]["max_batch_size"] == 8, "options win over the spec"
    assert not {"verify", "quantize", "build"} & reran(toolchain(*mine.command)), "the same as these options"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nformat: fp8\ncalib_sample: 4\n", "calib_sample"),
        ("format: fp8\n", "model"),
        ("model: m\nformat: fp8\ntp: two\n", "--tp is 'two'"),
        ("model: m\nformat: fp8\ntp: true\n", "--tp is True"),
        ("model: m\nformat: [fp8]\n", "--format"),
        ("model: m\nformat: fp8\ncalib-samples: 0\n", "--calib-samples"),
        ("- fp8\n", "list"),
        ("model: [\n", "YAML"),
        ("\udcff", "YAML"),
    ],
)
def test_a_spec_with_a_fault_is_refused(toolchain: Run, tmp_path: Path, text: str, words: str) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(text, errors="surrogateescape")
    ran = toolchain("engine", spec, "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-007"
    assert words in ran.json["error"]["message"]
    assert toolchain("engine", tmp_path / "absent.yaml", "--json").json["error"]["code"] == "TC-007"


def check_trtllm_bundle(engine: Path, checkpoint: Path) -> None:
    """Against knowledge of TensorRT-LLM 1.2.1: names of TorchLlmArgs, all at the top level."""
    arguments = yaml.safe_load((engine / "llm_args.yaml").read_text())
    assert arguments["backend"] == "pytorch" and arguments["tensor_parallel_size"] == 2
    assert arguments["moe_expert_parallel_size"] == 2 and arguments["pipeline_parallel_size"] == 1
    assert arguments["moe_config"] == {"backend": "CUTLASS"} or arguments["moe_config"] == {
        "backend": "TRTLLM"
    }
    assert arguments["max_batch_size"] == 4 and arguments["max_seq_len"] == 256
    assert arguments["kv_cache_config"]["dtype"] in ("auto", "fp8")
    assert "build_config" not in arguments and "model" not in arguments
    lock = json.loads((engine / "versions.lock.json").read_text())
    manifest = json.loads((engine / "engine.json").read_text())
    assert (
        lock["tensorrt_llm"] == manifest["target_version"] and lock["sm"] == 100 and lock["world_size"] == 2
    )
    assert manifest["files"] == described(engine)
    assert audit(checkpoint).passed


B200 = (
    "--target",
    "trtllm",
    "--gpu",
    "b200",
    "--tp",
    2,
    "--ep",
    2,
    "--max-batch-size",
    4,
    "--max-seq-len",
    256,
)


def test_target_trtllm(settled: Made, toolchain: Run) -> None:
    ran = toolchain(*settled.command, *B200)
    assert ran.status == 0, ran.err
    check_trtllm_bundle(settled.engine, settled.engine / "checkpoint")
    document = yaml.safe_load((settled.repository / "tensorrt_llm" / "1" / "model.yaml").read_text())
    assert (
        document["model"] == str(settled.engine / "checkpoint")
        and document["triton_config"]["decoupled"] is True
    )
    assert document["moe_config"] and lint_repository(settled.repository) == []
    assert toolchain(*settled.command).status == 0
    assert not (settled.engine / "llm_args.yaml").exists(), "the local target has none"
    assert json.loads((settled.engine / "engine.json").read_text())["files"] == described(settled.engine)


def test_build_makes_an_engine_for_another_target(mine: Made, toolchain: Run) -> None:
    before = tree(mine.engine)
    other = mine.root / "other"
    ran = toolchain("build", mine.engine, *B200, "--output", other, "--json")
    assert ran.status == 0, ran.err
    check_trtllm_bundle(other, other / "checkpoint")
    made, built = json.loads((mine.engine / "engine.json").read_text()), ran.json
    assert built["metrics"] == made["metrics"] and built["quant_algo"] == "NVFP4"
    calibration = made["stages"]["quantize"]["facts"]["calibration"]
    assert built["stages"]["quantize"]["facts"]["calibration"] == calibration
    assert built["inputs"]["checkpoint"] == {
        k: v for k, v in made["files"].items() if k.startswith("checkpoint/")
    }
    rendered = toolchain("triton", other, "--output", mine.root / "repository-of-other", "--json")
    assert rendered.status == 0 and rendered.json["target"] == "trtllm"
    assert tree(mine.engine) == before


def test_an_engine_that_was_built_shares_nothing_that_is_written_in_place(mine: Made, toolchain: Run) -> None:
    """Shards may be links to the same bytes. Whatever is done to the copy later, the first engine stays."""
    before = tree(mine.engine)
    other = mine.root / "other"
    assert toolchain("build", mine.engine / "checkpoint", "--gpu", "cpu", "--output", other).status == 0
    (other / "checkpoint" / "generation_config.json").write_text("{}")
    with (other / "checkpoint" / "config.json").open("a") as handle:
        handle.write("\n")
    again = ("--output", other, "--triton-output", mine.root / "r")
    assert toolchain(*mine.command[:-4], *again, "--force").status == 0
    assert toolchain("build", mine.engine, "--max-batch-size", 2, "--output", other, "--force").status == 0
    quantize = (
        "quantize",
        mine.source,
        "--format",
        "nvfp4",
        "--calib-data",
        mine.texts,
        "--calib-samples",
        2,
    )
    assert toolchain(*quantize, "--calib-length", 32, "--output", other / "checkpoint", "--force").status == 0
    shutil.rmtree(other)
    assert tree(mine.engine) == before


def test_build_where_the_source_model_is_not_at_hand(mine: Made, toolchain: Run) -> None:
    """People quantize in one container and build in another."""
    shutil.rmtree(mine.source)
    ran = toolchain("build", mine.engine, *B200, "--output", mine.root / "other", "--json")
    assert ran.status == 0, ran.err
    check_trtllm_bundle(mine.root / "other", mine.root / "other" / "checkpoint")
    kept = ("model", "model_identity", "format", "assignments")
    plans = [json.loads((mine.root / name / "plan.json").read_text()) for name in (mine.engine.name, "other")]
    assert [plans[0][key] for key in kept] == [plans[1][key] for key in kept]
    refused = toolchain("build", mine.engine, *B200[:4], "--tp", 3, "--output", mine.root / "third", "--json")
    assert refused.status == 2 and {item["code"] for item in refused.json["error"]["findings"]} >= {"TC-112"}


def test_nothing_is_built_from_a_checkpoint_that_fails_its_audit(mine: Made, toolchain: Run) -> None:
    from safetensors.torch import load_file, save_file

    path = mine.engine / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("weight_scale_2"))]
    save_file(tensors, path, {"format": "pt"})
    verified = toolchain("verify", mine.engine, "--json")
    assert verified.status == 1 and {item["code"] for item in verified.json["findings"]} >= {"TC-310"}
    ran = toolchain("build", mine.engine, "--output", mine.root / "other", "--json")
    assert ran.status == 1 and ran.json["error"]["code"] == "TC-402"
    assert not (mine.root / "other").exists()


KILLED = """
import json, os, signal, sys, time
import torch
import toolchain.evaluate.checkpoint, toolchain.quantize.job, toolchain.triton.render
import modelopt.torch.export.convert_hf_config, modelopt.torch.quantization, tritonclient.grpc
from transformers import AutoTokenizer, Qwen3MoeForCausalLM
from toolchain.cli.main import main

torch.set_num_threads(1)

def start(arguments):
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            main(arguments)
        except SystemExit as end:
            os._exit(end.code or 0)
    return child

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def tell(status):
    print(json.dumps(status), flush=True)
    sys.stdin.readline()  # until what is there was looked at

def look(child):
    tell(wait(child))

command, other, instants = json.loads(sys.argv[1])
started = time.monotonic()
status = wait(start([*command, *other]))
took = time.monotonic() - started
tell(status)
for number in range(instants):
    arguments = [*command, "--seed", str(number)]
    child = start(arguments)
    time.sleep(took * (number + 0.5) / instants)
    os.kill(child, signal.SIGKILL)
    look(child)
    if number % 3 == 2:
        look(start(arguments))
look(start([*command, "--seed", "0"]))
"""
"""Everything is imported once; each run is a child, killed from outside with SIGKILL at another instant of its work.
Seeds differ, so that every run has all of its work to do; every third is finished, so that the next one finds a
finished engine to replace."""


def check_what_is_there(made: Made) -> None:
    """Whatever is there under its name is complete."""
    engine = made.engine
    if (engine / "checkpoint").exists():
        assert audit(engine / "checkpoint", against=made.source).passed
    for path in [engine / name for name in ("plan.json", "verify.json", "metrics.json")]:
        assert not path.exists() or json.loads(path.read_text())
    if (engine / "engine.json").exists():
        manifest = json.loads((engine / "engine.json").read_text())
        assert manifest["files"] == described(engine), "engine.json does not describe the files beside it"
    if made.repository.exists():
        assert lint_repository(made.repository, check_paths=False) == []


def test_killed_at_any_instant(mine: Made) -> None:
    """Nothing half-written is ever seen, every next run goes on, and the last one makes the same bytes."""
    original = sha256(mine.engine / "checkpoint" / "model.safetensors")
    shutil.rmtree(mine.engine)
    shutil.rmtree(mine.repository)
    command = [str(word) for word in mine.command]
    other = ["--output", str(mine.root / "other"), "--triton-output", str(mine.root / "other-repository")]
    script = [sys.executable, "-c", KILLED, json.dumps([command, other, 15])]
    statuses: list[int] = []
    with subprocess.Popen(
        script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        for line in process.stdout:
            statuses.append(json.loads(line))
            check_what_is_there(mine)
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait() == 0
    assert statuses.count(-9) >= 10 and set(statuses) == {0, -9} and statuses[-1] == 0
    names = {path.name for path in mine.engine.iterdir()}
    assert names == {
        ".lock",
        "checkpoint",
        "engine.json",
        "metrics.json",
        "plan.json",
        "report",
        "sbom.cdx.json",
        "stages",
        "verify.json",
    }
    assert sha256(mine.engine / "checkpoint" / "model.safetensors") == original


@pytest.mark.parametrize("target", ["local", "trtllm"])
@pytest.mark.parametrize("kind", ["directory", "hub id", "demo"])
def test_make_serves_the_engine_that_make_makes(kind: str, target: str, tmp_path: Path) -> None:
    """One name, in the Makefile and by default in `toolchain engine`."""
    from toolchain.pipeline.request import EngineRequest

    (tmp_path / "My+Model").mkdir()
    (tmp_path / "demo-moe").mkdir()
    given = {"directory": str(tmp_path / "My+Model"), "hub id": "Qwen/Qwen3-30B-A3B", "demo": ""}[kind]
    command = [
        "make",
        "-n",
        "bench",
        *([f"MODEL={given}"] if given else []),
        "FORMAT=fp8",
        f"TARGET={target}",
        "GPU=h100",
    ]
    root = Path(__file__).parent.parent
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    model = given or str(tmp_path / "demo-moe")  # the demo's directory need not be there yet
    request = EngineRequest(model=model, format="fp8", target=target, gpu="h100")
    assert f'bench "engines/{request.engine_name()}"' in printed
