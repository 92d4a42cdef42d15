"""The directory for NIM: complete engines are written, incomplete ones named file by file and not written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deployments import write_engine
from toolchain.core.errors import FindingsError, UsageError
from toolchain.deploy.nim import Nim, prepare_nim, write_nim

GOLDENS = Path(__file__).parent / "golden" / "nim"
ESSENTIAL = (
    "config.json",
    "hf_quant_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors",
)


def codes(nim: Nim, severity: str = "error") -> list[str]:
    return [finding.code for finding in nim.findings if finding.severity == severity]


def test_a_complete_engine(tmp_path: Path) -> None:
    nim = prepare_nim(write_engine(tmp_path / "e", tp=2, ep=2))
    assert nim.findings == ()
    record = write_nim(nim, tmp_path / "nim")
    model = tmp_path / "nim" / "model"
    assert {path.name for path in model.iterdir()} == {
        *ESSENTIAL, "generation_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert (model / "model.safetensors").stat().st_ino == (
        tmp_path / "e" / "checkpoint" / "model.safetensors"
    ).stat().st_ino
    config = (model / "config.json").read_bytes()
    assert record["sha256"]["config.json"] == hashlib.sha256(config).hexdigest()
    assert json.loads((tmp_path / "nim" / "nim.json").read_text()) == record
    environment = dict(line.split("=", 1) for line in (tmp_path / "nim" / "nim.env").read_text().splitlines())
    assert environment == {
        "NIM_MODEL_PATH": "/opt/models/e",
        "NIM_SERVED_MODEL_NAME": "e",
        "NIM_PASSTHROUGH_ARGS": "--quantization modelopt_fp4 --kv-cache-dtype fp8 --tensor-parallel-size 2 "
        "--max-model-len 8192 --max-num-seqs 64 --enable-expert-parallel",
    }


@pytest.mark.parametrize(("major", "backend"), [("1", "tensorrt_llm"), ("2", "vllm"), ("2", "sglang")])
def test_golden_nim(major: str, backend: str, tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", tp=4, ep=4)
    write_nim(prepare_nim(engine, major=major, backend=backend), tmp_path / "nim")
    for name in ("nim.env", "run.sh", "nim.json"):
        found, path = (tmp_path / "nim" / name).read_text(), GOLDENS / f"{major}-{backend}-{name}"
        if os.environ.get("WRITE_GOLDENS"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(found)
        assert found == path.read_text(), f"{path.name} changed: `make goldens` if that is wanted"


def test_nim_1_runs_tensorrt_llm(tmp_path: Path) -> None:
    nim = prepare_nim(
        write_engine(tmp_path / "e", tp=4, formats=("fp8_block",), quant_algo="FP8_BLOCK_SCALES"), major="1"
    )
    assert (codes(nim), codes(nim, "warning")) == ([], ["TC-464"])
    assert nim.environment == {
        "NIM_MODEL_NAME": "/opt/models/e",
        "NIM_SERVED_MODEL_NAME": "e",
        "NIM_TENSOR_PARALLEL_SIZE": "4",
        "NIM_PIPELINE_PARALLEL_SIZE": "1",
        "NIM_MAX_MODEL_LEN": "8192",
    }
    local = prepare_nim(write_engine(tmp_path / "local", target="local", gpu="cpu"), major="1")
    assert codes(local) == ["TC-460"]


@pytest.mark.parametrize("name", ESSENTIAL)
def test_a_missing_file_is_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e")
    (engine / "checkpoint" / name).unlink()
    if name == "config.json":
        with pytest.raises(UsageError, match="checkpoint is gone"):
            prepare_nim(engine)
        return
    nim = prepare_nim(engine)
    assert codes(nim) == ["TC-461"] and any(name in str(finding) for finding in nim.findings)
    with pytest.raises(FindingsError, match=r"is not what NIM 2\.x with vllm loads"):
        write_nim(nim, tmp_path / "nim")
    assert not (tmp_path / "nim").exists()


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", formats=("int4_awq",), quant_algo="W4A16_AWQ")
    for path in (engine / "checkpoint").glob("*token*"):
        path.unlink()
    (engine / "checkpoint" / "chat_template.jinja").unlink()
    (engine / "checkpoint" / "generation_config.json").unlink()
    nim = prepare_nim(engine)
    assert codes(nim) == ["TC-460", "TC-461", "TC-461"]
    assert codes(nim, "warning") == ["TC-461", "TC-462"]


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e")
    checkpoint = engine / "checkpoint"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "model-00002-of-00002.safetensors").touch()
    assert codes(prepare_nim(engine)) == ["TC-461"]
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00003-of-00003.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    named = [finding.where.rsplit("/", 1)[1] for finding in prepare_nim(engine).findings]
    assert named == ["model-00002-of-00002.safetensors", "model-00003-of-00003.safetensors"]


def test_backends_have_their_own_tables(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", formats=("mxfp8",), quant_algo="MXFP8")
    assert codes(prepare_nim(engine, backend="vllm")) == []
    assert codes(prepare_nim(engine, backend="sglang")) == ["TC-460"]
    with pytest.raises(UsageError, match="has no backend 'vllm'"):
        prepare_nim(engine, major="1", backend="vllm")


def test_the_script_runs_the_image_on_the_directory(tmp_path: Path) -> None:
    """With a stand-in for docker: what it is asked for, from another working directory, odd names included."""
    engine = write_engine(tmp_path / 'odd "$(name)')
    write_nim(prepare_nim(engine), tmp_path / "nim")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "docker").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (programs / "docker").chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin"}
    script = tmp_path / "nim" / "run.sh"
    refused = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0 and "name the image" in refused.stderr
    environment["NIM_IMAGE"] = "registry.example/nim:2.1.5"
    ran = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60, cwd="/")
    words = ran.stdout.splitlines()
    assert words[-1] == "registry.example/nim:2.1.5"
    assert f"type=bind,source={tmp_path}/nim/model,target=/opt/models/odd-name-,readonly" in words
    assert "127.0.0.1:8000:8000" in words


def test_command_line(toolchain: Callable[..., Any], tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e")
    ran = toolchain("nim", engine, "--output", tmp_path / "nim", "--json")
    assert (ran.status, ran.json["nim"], ran.json["findings"]) == (0, "2.x", [])
    assert toolchain("nim", engine, "--output", tmp_path / "nim").status == 2
    (engine / "checkpoint" / "hf_quant_config.json").unlink()
    dry = toolchain("nim", engine, "--dry-run", "--json")
    assert dry.status == 1 and dry.json["findings"][0]["code"] == "TC-461"
    failed = toolchain("nim", engine, "--output", tmp_path / "other", "--json")
    assert failed.status == 1 and failed.json["error"]["findings"]
    assert not (tmp_path / "other").exists()


def test_a_real_engine(made: Any, tmp_path: Path) -> None:
    """What `toolchain engine` writes lacks nothing that NIM 2.x reads, and others than its owner may read it."""
    nim = prepare_nim(made.engine)
    assert nim.findings == ()
    record = write_nim(nim, tmp_path / "nim")
    manifest = json.loads((made.engine / "engine.json").read_text())
    for name, digest in record["sha256"].items():
        assert manifest["files"][f"checkpoint/{name}"] == digest
