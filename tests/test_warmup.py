"""``toolchain build --warmup`` against a stand-in: TensorRT-LLM cannot be installed here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architectures import Architectures, write_config
from tests.conftest import Made, Ran
from tests.fake_tensorrt_llm import install
from toolchain.build.bundle import _family, _is_moe
from toolchain.build.llmapi.files import remove_trtllm_files, write_trtllm_files
from toolchain.build.llmapi.warmup import warm_up
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Silent
from toolchain.pipeline.planning import make_request_plan
from toolchain.pipeline.request import read_spec

SPEC = Path(__file__).parent.parent / "engines" / "qwen3-30b-a3b-h100.yaml"


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def engine(architectures: Architectures, tmp_path: Path) -> Path:
    """The bundle of a shipped spec around a config.json."""
    request = read_spec(SPEC, {})
    plan = make_request_plan(request, architectures.get("qwen3-30b-a3b"))
    directory = tmp_path / "an engine"
    write_config("qwen3-30b-a3b", directory / "checkpoint")
    write_trtllm_files(directory, plan, _family(plan, {}), is_moe=_is_moe(plan), name="engine")
    return directory


def with_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str = "1.2.1", behaviour: str = "works"
) -> None:
    where = install(tmp_path / "site", version, behaviour)
    monkeypatch.syspath_prepend(str(where))
    monkeypatch.setenv("PYTHONPATH", str(where))


def test_success_is_recorded(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_stand_in(tmp_path, monkeypatch)
    notes = Notes()
    found = warm_up(engine, progress=notes)
    assert found["ran"] and found == {"ran": True, **json.loads((engine / "warmup.json").read_text())}
    assert found["tensorrt_llm"] == found["versions"]["tensorrt-llm"] == "1.2.1"
    assert found["llm_args_sha256"] == hashlib.sha256((engine / "llm_args.yaml").read_bytes()).hexdigest()
    assert (
        found["config_sha256"]
        == hashlib.sha256((engine / "checkpoint" / "config.json").read_bytes()).hexdigest()
    )
    assert [item["tokens"] for item in found["generated"]] == [16, 16]
    # What the log says of kernels reaches the record, with the arguments that LLM() got; the rest stays in the log.
    assert any("MoEResolutionReport" in line and "CUTLASS" in line for line in found["chosen"])
    assert any("Autotun" in line for line in found["chosen"])
    assert "shut down" in (engine / "warmup.log").read_text()
    assert any("loading" in line for line in notes.said) and any("done in" in line for line in notes.said)
    assert not list(engine.glob("*.partial"))


def test_the_script_needs_no_toolchain(engine: Path, tmp_path: Path) -> None:
    """As the container runs it: another directory, python3 and tensorrt_llm."""
    where = install(tmp_path / "site", "1.2.1")
    (tmp_path / "site" / "toolchain").mkdir()
    (tmp_path / "site" / "toolchain" / "__init__.py").write_text(
        "raise ImportError('not in the container')\n"
    )
    done = subprocess.run(
        [sys.executable, str(engine / "warmup.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(where)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "done in" in done.stderr and (engine / "warmup.json").is_file()


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("fails", "RuntimeError: no kernel for this GPU"),
        ("killed", "was killed by SIGKILL"),
        ("silent", "no tokens came out for 2 of 2 prompts"),
    ],
)
def test_a_failure_names_its_cause_and_leaves_no_result(
    behaviour: str, words: str, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stand_in(tmp_path, monkeypatch, behaviour=behaviour)
    (engine / "warmup.json").write_text('{"of": "an earlier run"}')
    with pytest.raises(ToolchainError) as failed:
        warm_up(engine)
    assert failed.value.code == "TC-411" and words in failed.value.message
    assert "warmup.log" in failed.value.hint and "MoEResolutionReport" in (engine / "warmup.log").read_text()
    assert not (engine / "warmup.json").exists()


def test_one_that_hangs_is_ended(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_stand_in(tmp_path, monkeypatch, behaviour="hangs")
    started = time.monotonic()
    with pytest.raises(ToolchainError, match="no end after 5 s"):
        warm_up(engine, timeout_s=5)
    assert time.monotonic() - started < 120 and not (engine / "warmup.json").exists()


@pytest.mark.parametrize("metadata", [True, False], ids=["pip", "no metadata"])
def test_another_release_is_refused(
    metadata: bool, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stand_in(tmp_path, monkeypatch, version="1.3.0rc22")
    if not metadata:
        (info,) = (tmp_path / "site").glob("*.dist-info")
        (info / "METADATA").unlink()
        info.rmdir()
    with pytest.raises(UsageError) as refused:
        warm_up(engine)
    assert refused.value.code == "TC-410"
    assert "1.3.0rc22" in refused.value.message and "1.2.1" in refused.value.message
    assert not (engine / "warmup.json").exists()


def test_without_tensorrt_llm_the_container_command_is_named(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The directory of a Triton repository is no package.
    (tmp_path / "repository" / "tensorrt_llm" / "1").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "repository"))
    found = warm_up(engine)
    assert found["ran"] is False
    recorded = json.loads((engine / "commands.json").read_text())["commands"]
    assert found["command"] in [item["container"] for item in recorded]
    assert (
        "nvcr.io/nvidia/tensorrt-llm/release:1.2.1" in found["command"]
        and "python3 warmup.py" in found["command"]
    )


def test_only_engines_of_target_trtllm_are_warmed_up(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        warm_up(tmp_path)
    assert refused.value.code == "TC-412"


def test_results_of_another_bundle_are_removed(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stand_in(tmp_path, monkeypatch)
    warm_up(engine)
    remove_trtllm_files(engine)
    assert [path.name for path in engine.iterdir()] == ["checkpoint"]


def build(toolchain: Callable[..., Ran], engine: Path, output: Path, *options: object) -> Ran:
    words = ("build", engine, "--target", "trtllm", "--gpu", "b200", "--output", output, "--warmup", "--json")
    return toolchain(*words, *options)


def test_build_warms_up(
    made: Made, toolchain: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = build(toolchain, made.engine, tmp_path / "without")
    assert absent.status == 0, absent.err
    assert absent.json["warmup"]["ran"] is False and "docker run" in absent.json["warmup"]["command"]
    with_stand_in(tmp_path, monkeypatch)
    other = build(toolchain, made.engine, tmp_path / "other", "--trtllm-version", "1.1.0")
    assert other.status == 2 and other.json["error"]["code"] == "TC-410"
    assert not (tmp_path / "other").exists(), "refused before anything is written"
    ran = build(toolchain, made.engine, tmp_path / "with")
    assert ran.status == 0, ran.err
    assert ran.json["warmup"]["ran"] and (tmp_path / "with" / "warmup.json").is_file()
    local = toolchain("build", made.engine, "--output", tmp_path / "local", "--warmup", "--json")
    assert local.status == 2 and local.json["error"]["code"] == "TC-412" and not (tmp_path / "local").exists()
