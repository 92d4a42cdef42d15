"""The lint finds each planted fault, at its place, and nothing in a sound repository (test_triton_render.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine_dirs import write_engine
from toolchain.triton.lint import lint_repository
from toolchain.triton.render import render_repository

CONFIG = "tensorrt_llm/config.pbtxt"
YAML = "tensorrt_llm/1/model.yaml"
SERVED = "tensorrt_llm/1/served.json"


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(repository: Path) -> None:
        text = (repository / file).read_text()
        assert old in text
        (repository / file).write_text(text.replace(old, new, 1))

    return apply


def append(text: str) -> Callable[[Path], None]:
    return lambda repository: edit(CONFIG, "instance_group", f"{text}\ninstance_group")(repository)


def remove(name: str) -> Callable[[Path], None]:
    return lambda repository: (repository / name).unlink()


FAULTS: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("local", edit(CONFIG, 'backend: "python"', 'backnd: "python"'), "TC-601", 'no field named "backnd"'),
    ("local", edit(CONFIG, "TYPE_STRING", "TYPE_TEXT"), "TC-601", "TYPE_TEXT"),
    ("local", append("max_batch_size: -4"), "TC-602", "max_batch_size -4"),
    ("local", append("max_batch_size: 8"), "TC-602", "decoupled True"),
    ("local", edit(CONFIG, "dims: -1", "dims: -7"), "TC-602", "'text_input' has dims [-7]"),
    ("local", edit(CONFIG, 'name: "streaming"', 'name: "text_input"'), "TC-602", "declared 2 times"),
    ("local", edit(CONFIG, 'name: "stop_reason"', 'name: "text_output"'), "TC-602", "output 'text_output'"),
    ("local", edit(CONFIG, "count: 1", "count: -1"), "TC-602", "count -1"),
    ("local", append("# 1\nversion_policy { specific { versions: ${version} } }"), "TC-603", "${version}"),
    ("local", remove(CONFIG), "TC-602", "decoupled False"),
    ("local", remove("tensorrt_llm/1/model.py"), "TC-604", "model.py"),
    ("local", remove("tensorrt_llm/1/engine_process.py"), "TC-604", "engine_process.py"),
    ("local", lambda repository: shutil.rmtree(repository / "tensorrt_llm/1"), "TC-604", "no version directory"),
    ("local", lambda repository: shutil.rmtree(repository / "tensorrt_llm"), "TC-604", "no model directory"),
    ("local", edit(CONFIG, 'name: "tensorrt_llm"', 'name: "trtllm"'), "TC-605", "'trtllm' in directory"),
    ("local", edit(CONFIG, 'backend: "python"', 'backend: "pyton"'), "TC-607", "'pyton'"),
    ("local", edit(CONFIG, 'backend: "python"', 'default_model_filename: "model.bin"'), "TC-607", "no backend"),
    ("local", lambda repository: shutil.rmtree(repository.parent / "engine"), "TC-610", "engine_dir"),
    ("local", edit(SERVED, "/bin/python", "/bin/pythoff"), "TC-610", "not an executable"),
    ("trtllm", append("max_batch_size: 0"), "TC-606", "max_batch_size is set here"),
    ("trtllm", append("model_transaction_policy { decoupled: false }"), "TC-606", "decoupled is set here"),
    ("trtllm", edit(CONFIG, "count: 1", "count: 2"), "TC-608", "without the parameter gpu_device_ids"),
    (
        "trtllm",
        append('parameters { key: "gpu_device_ids" value { string_value: "0;1" } }'),
        "TC-608",
        "1 instances but",
    ),
    (
        "trtllm",
        append('parameters { key: "gpu_device_ids" value { string_value: "0-3" } }'),
        "TC-608",
        "expected the form",
    ),
    ("trtllm", remove("tensorrt_llm/1/helpers.py"), "TC-604", "helpers.py"),
    ("trtllm", remove(YAML), "TC-604", "model.yaml"),
    ("trtllm", edit(YAML, "backend: pytorch", "backend: [pytorch"), "TC-609", f"{YAML}:2:"),
    ("trtllm", edit(YAML, "triton_config", "triton_confg"), "TC-609", "triton_config is missing"),
    ("trtllm", edit(YAML, "max_batch_size: 0", "max_batch_size: 64"), "TC-609", "64, expected 0"),
    ("trtllm", edit(YAML, "decoupled: true", "decoupled: sometimes"), "TC-609", "'sometimes'"),
    ("trtllm", edit(YAML, "backend: pytorch", "build_config: {max_batch_size: 4}"), "TC-609", "build_config"),
    ("trtllm", edit(YAML, "pytorch", "${backend}"), "TC-603", "${backend}"),
    ("trtllm", lambda repository: shutil.rmtree(repository.parent / "engine"), "TC-610", "does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "plant", "code", "expected"), FAULTS)
def test_planted_fault(
    target: str, plant: Callable[[Path], None], code: str, expected: str, tmp_path: Path
) -> None:
    repository = render_repository(write_engine(tmp_path / "engine", target=target), tmp_path / "repo")
    plant(repository)
    findings = lint_repository(repository)
    assert any(finding.code == code and expected in str(finding) for finding in findings), findings


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    repository = render_repository(write_engine(tmp_path / "engine", target="trtllm"), tmp_path / "repo")
    for plant in (
        append("max_batch_size: -4"),
        edit(YAML, "decoupled: true", "decoupled: 3"),
        remove(CONFIG[:13] + "1/model.py"),
    ):
        plant(repository)
    assert {finding.code for finding in lint_repository(repository)} == {
        "TC-602",
        "TC-604",
        "TC-606",
        "TC-609",
    }


def test_parse_errors_name_line_and_column(tmp_path: Path) -> None:
    repository = render_repository(write_engine(tmp_path / "engine"), tmp_path / "repo")
    lines = (repository / CONFIG).read_text().splitlines()
    lines[6:6] = ["  shape: [ 4 ]"]
    (repository / CONFIG).write_text("\n".join(lines))
    (finding,) = lint_repository(repository)
    assert finding.where == f"{CONFIG}:7:3" and '"shape"' in finding.message


def test_missing_repository(tmp_path: Path) -> None:
    assert [finding.code for finding in lint_repository(tmp_path / "none")] == ["TC-604"]
