"""`toolchain build --target tensorrt` with a stand-in for trtllm-build (tests/fake_trtllm_build.py): it takes the
recorded flags and no others. The real trtllm-build has not been run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran
from tests.fake_trtllm_build import BEHAVIOUR, install
from tests.planning import plan_for
from toolchain.build.tensorrt import read_lock, require_built
from toolchain.build.tensorrt.command import arguments, container_command
from toolchain.build.tensorrt.flags import FLAGS, check_arguments
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.findings import errors
from toolchain.models.reader import read_model
from toolchain.plan.planner import make_plan
from toolchain.plan.types import Plan, Serving
from toolchain.quantize.job import quantize

Tiny = Callable[[str], Path]
Run = Callable[..., Ran]
VERSION = "1.2.1"
COMMAND = ("--target", "tensorrt", "--gpu", "h100", "--trtllm-version", VERSION)


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 Llama with its plan beside it. Read only."""
    directory = tmp_path_factory.mktemp("quantized") / "checkpoint"
    plan = plan_for(tiny("llama"), "fp8", kv_cache="fp8")
    quantize(plan, directory, device="cpu")
    (directory / "plan.json").write_text(json.dumps(plan.to_json()))
    return directory


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")


def put_on_path(
    monkeypatch: pytest.MonkeyPatch, root: Path, version: str = VERSION, behaviour: str = ""
) -> None:
    """The stand-in, of ``version``, and no other program."""
    monkeypatch.setenv("PATH", str(install(root, version)))
    monkeypatch.setenv(BEHAVIOUR, behaviour)


def build(toolchain: Run, source: Path, output: Path, *more: object) -> Ran:
    return toolchain("build", source, *COMMAND, "--output", output, *more, "--json")


def test_builds_an_engine_and_records_what_made_it(
    toolchain: Run, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(monkeypatch, tmp_path / "env")
    output = tmp_path / "engine"
    ran = build(toolchain, quantized, output, "--tp", 2, "--max-batch-size", 4, "--max-seq-len", 256)
    assert ran.status == 0, ran.err
    record = json.loads((output / "trtllm_build.json").read_text())
    assert record["built"] is True and record["program_version"] == VERSION and record["seconds"] > 0
    assert record["command"][0] == "trtllm-build" and str(output / "engine") in record["command"]
    assert sorted(path.name for path in (output / "engine").iterdir()) == [
        "config.json",
        "rank0.engine",
        "rank1.engine",
    ]
    told = json.loads((output / "engine" / "config.json").read_text())["build_config"]
    limits = {"max_batch_size": 4, "max_seq_len": 256, "max_input_len": 255, "max_num_tokens": 8192}
    assert {key: told[key] for key in limits} == limits
    assert (told["use_fp8_context_fmha"], told["gemm_plugin"], told["workers"]) == ("enable", "disable", 2)
    assert "Engine serialized" in (output / "trtllm-build.log").read_text()
    assert "network optimized in 00:00:01" in ran.err
    manifest = json.loads((output / "engine.json").read_text())
    assert {"engine/rank1.engine", "trtllm_checkpoint/rank1.safetensors"} <= set(manifest["files"])
    lock = json.loads((output / "versions.lock.json").read_text())
    assert (lock["tensorrt_llm"], lock["sm"], lock["world_size"]) == (VERSION, 90, 2)
    assert not list(tmp_path.glob("engine.*"))
    assert require_built(output, read_lock(output))["version"] == VERSION


def test_without_trtllm_build_the_container_command_is_told_and_recorded(
    toolchain: Run, quantized: Path, tmp_path: Path, no_program: None
) -> None:
    output = tmp_path / "engine"
    ran = build(toolchain, quantized, output)
    assert ran.status == 0, ran.err
    record = json.loads((output / "trtllm_build.json").read_text())
    assert record["built"] is False and record["program"] is None
    command = record["container_command"]
    assert command.startswith("docker run ") and f"release:{VERSION} trtllm-build --checkpoint_dir" in command
    assert f"{output}:/bundle" in command
    assert command in " ".join(ran.err.split())
    assert (output / "trtllm_checkpoint" / "rank0.safetensors").is_file()
    assert not (output / "engine").exists()
    with pytest.raises(ToolchainError, match="not built yet") as caught:
        require_built(output, read_lock(output))
    assert caught.value.code == "TC-424"


def test_a_failed_build_leaves_its_log_and_nothing_else(
    toolchain: Run, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(monkeypatch, tmp_path / "env", behaviour="fail")
    ran = build(toolchain, quantized, tmp_path / "out" / "engine")
    assert ran.status == 1
    assert "TC-422" in ran.out + ran.err and "Engine building failed" in ran.out + ran.err
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["engine.trtllm-build.log"]


@pytest.mark.parametrize(("behaviour", "code"), [("no-engine", "TC-424"), ("version=1.1.0", "TC-423")])
def test_an_engine_that_is_missing_or_of_another_release_is_no_success(
    toolchain: Run,
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    code: str,
) -> None:
    put_on_path(monkeypatch, tmp_path / "env", behaviour=behaviour)
    ran = build(toolchain, quantized, tmp_path / "out" / "engine")
    assert ran.status == 1 and code in ran.out + ran.err
    assert not (tmp_path / "out" / "engine").exists()


def test_another_release_on_this_machine_is_refused_before_the_build(
    toolchain: Run, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(monkeypatch, tmp_path / "env", version="1.0.0")
    ran = build(toolchain, quantized, tmp_path / "out" / "engine")
    assert ran.status == 2 and "TC-423" in ran.out + ran.err and "1.0.0" in ran.out + ran.err
    assert not list((tmp_path / "out").iterdir())


def test_a_gpu_of_another_kind_is_refused(
    toolchain: Run, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(monkeypatch, tmp_path / "env")
    smi = tmp_path / "env" / "bin" / "nvidia-smi"
    smi.write_text(f"#!{sys.executable}\nprint('8.0')\n")
    smi.chmod(0o755)
    ran = build(toolchain, quantized, tmp_path / "out" / "engine")
    assert ran.status == 2 and "SM80" in ran.out + ran.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_build_ends_its_processes_and_leaves_no_engine(
    quantized: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """From outside, as a user or a scheduler does it."""
    bin_directory = install(tmp_path / "env", VERSION)
    output = tmp_path / "out" / "engine"
    environment = os.environ | {"PATH": f"{bin_directory}:{os.environ['PATH']}", BEHAVIOUR: "hang"}
    words = ["build", str(quantized), *COMMAND, "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from toolchain.cli.main import main; main()", *words],
        env=environment,
        stderr=subprocess.PIPE,
    )
    log = tmp_path / "out" / "engine.trtllm-build.log"
    found = wait_for(lambda: re.search(r"worker (\d+)", log.read_text()) if log.is_file() else None)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: not is_running(int(found.group(1))))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [log.name]


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def is_running(pid: int) -> bool:
    """False for zombies too: in a container nobody may reap an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_build_that_takes_too_long_is_ended(
    quantized: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.build.tensorrt import write_tensorrt_files
    from toolchain.core.progress import Silent

    put_on_path(monkeypatch, tmp_path / "env", behaviour="hang")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "checkpoint").symlink_to(quantized)
    with pytest.raises(ToolchainError, match="took longer than 3 s"):
        write_tensorrt_files(bundle, planned(tiny("llama")), timeout_s=3, progress=Silent())
    assert not (bundle / "engine").exists()


def planned(model: Path, format: str = "fp8", **options: Any) -> Plan:
    chosen = {
        "gpu": "h100",
        "kv_cache": "none",
        "serving": Serving(max_batch_size=4, max_seq_len=256),
        **options,
    }
    return plan_for(model, format, target="tensorrt", target_version=VERSION, **chosen)


PLUGINS = ("use_paged_context_fmha", "use_fp8_context_fmha", "gemm_plugin")


@pytest.mark.parametrize(
    ("format", "gpu", "kv", "expected"),
    [
        ("fp8", "h100", "fp8", ("enable", "enable", "disable")),
        ("fp8", "h100", "none", ("enable", "disable", "disable")),
        # builder.py turns paged context off where an FP8 cache comes without FP8 attention
        ("int4_awq", "a100", "fp8", ("disable", "disable", "auto")),
        ("nvfp4", "b200", "fp8", ("enable", "enable", "nvfp4")),
    ],
)
def test_plugins_that_the_plan_chooses(
    tiny: Tiny, tmp_path: Path, format: str, gpu: str, kv: str, expected: tuple[str, ...]
) -> None:
    words = arguments(planned(tiny("llama"), format, gpu=gpu, kv_cache=kv), tmp_path)
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert tuple(told[f"--{name}"] for name in PLUGINS) == expected


def test_container_command_golden(tiny: Tiny) -> None:
    serving = Serving(max_batch_size=8, max_seq_len=512, tp=2, ep=2)
    plan = planned(tiny("qwen3_moe"), serving=serving)
    assert container_command(plan, Path("/engines/e")) == (
        "docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 "
        "--volume /engines/e:/bundle nvcr.io/nvidia/tensorrt-llm/release:1.2.1 trtllm-build "
        "--checkpoint_dir /bundle/trtllm_checkpoint --output_dir /bundle/engine --max_batch_size 8 --max_input_len 511 "
        "--max_seq_len 512 --max_num_tokens 8192 --max_beam_width 1 --kv_cache_type paged "
        "--remove_input_padding enable --gpt_attention_plugin auto --gemm_plugin disable "
        "--use_paged_context_fmha enable --use_fp8_context_fmha disable --moe_plugin auto --nccl_plugin auto "
        "--workers 2 --log_level info"
    )


def test_recorded_flags() -> None:
    """What is on NVIDIA's page of trtllm-build, written down by hand, is recorded; the rest is refused."""
    documented = (
        "checkpoint_dir model_config build_config output_dir max_batch_size max_input_len max_seq_len max_beam_width "
        "max_num_tokens opt_num_tokens kv_cache_type workers input_timing_cache output_timing_cache strip_plan "
        "weight_streaming fast_build dry_run monitor_memory logits_dtype gpt_attention_plugin gemm_plugin moe_plugin "
        "fp8_rowwise_gemm_plugin gemm_swiglu_plugin low_latency_gemm_plugin nccl_plugin use_fp8_context_fmha "
        "use_paged_context_fmha"
    )
    assert set(documented.split()) <= set(FLAGS)
    check_arguments(["--max_batch_size", "4", "--dry_run", "--gemm_plugin", "nvfp4"], VERSION)
    for words, said in (
        (["--max_bach_size", "4"], "not among its flags"),
        (["--max_batch_size"], "value is missing"),
        (["--max_batch_size", "many"], "not a number"),
        (["--gemm_plugin", "int4"], "not one of auto"),
    ):
        with pytest.raises(UsageError, match=said):
            check_arguments(words, VERSION)
    with pytest.raises(UsageError, match=r"gone in 1\.3\.0rc21"):
        check_arguments([], "1.3.0rc22")


@pytest.mark.parametrize(
    ("kind", "format", "options", "said"),
    [
        ("deepseek_v3", "fp8", {}, "no TensorRT model class"),
        ("deepseek_v2", "fp8", {}, "products of MLA projections"),
        ("glm4_moe", "fp8", {}, "no TensorRT model class"),
        ("gpt_oss", "fp8", {}, "no TensorRT model class"),
        ("mixtral", "nvfp4", {"gpu": "b200"}, "does not run nvfp4 for a mixture"),
        ("llama", "int8_wo", {}, "does not run int8_wo"),
        ("llama", "fp8", {"target_version": "1.3.0rc22"}, "does not run fp8"),
        ("llama", "fp8", {"gpu": "a100"}, "does not run fp8"),
    ],
)
def test_a_plan_refuses_what_cannot_be_built(
    tiny: Tiny, kind: str, format: str, options: dict[str, Any], said: str
) -> None:
    wishes = {"gpu": "h100", "target_version": VERSION, **options}
    plan = make_plan(read_model(str(tiny(kind))), format=format, target="tensorrt", **wishes)
    assert any(said in finding.message for finding in errors(plan.findings)), plan.findings


def test_a_plan_refuses_several_formats_and_a_quantized_head(tiny: Tiny) -> None:
    from toolchain.plan.policy import PolicyOptions

    info = read_model(str(tiny("llama")))
    for options, said in (
        (PolicyOptions(attention="fp8"), "several formats (fp8, nvfp4)"),
        (PolicyOptions(lm_head="same"), "an lm_head in nvfp4"),
    ):
        plan = make_plan(
            info, format="nvfp4", policy="mlp-only", policy_options=options, target="tensorrt", gpu="b200"
        )
        found = [finding for finding in errors(plan.findings) if finding.code == "TC-127"]
        assert any(said in finding.message for finding in found), plan.findings


def test_the_whole_picture_and_the_engine_once_there_is_a_trtllm_build(
    toolchain: Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`toolchain engine` makes the bundle and its repository; a later run, with the program, makes the engine only."""
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"def f{i}(x):\n    return x * {i}\n" for i in range(200)))
    output, repository = tmp_path / "engine", tmp_path / "repository"
    words = ("engine", tiny("qwen3"), "--format", "fp8", *COMMAND, "--calib-data", texts, "--calib-samples", 8,
             "--calib-length", 64, "--eval-data", texts, "--eval-tokens", 256, "--output", output,
             "--triton-output", repository, "--json")  # fmt: skip
    search = os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nonexistent")
    first = toolchain(*words)
    assert first.status == 0, first.err
    assert not (output / "engine").exists() and (repository / "ensemble" / "config.pbtxt").is_file()
    monkeypatch.setenv("PATH", f"{install(tmp_path / 'env', VERSION)}:{search}")
    second = toolchain(*words)
    assert second.status == 0, second.err
    assert "quantize: unchanged, skipped" in second.err and "trtllm-build changed" in second.err
    assert (output / "engine" / "rank0.engine").is_file()
    manifest = json.loads((output / "engine.json").read_text())
    assert "engine/rank0.engine" in manifest["files"] and manifest["target"] == "tensorrt"
