"""Commands of vLLM and SGLang: the options by what their documentation says, refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.deployments import write_engine
from toolchain.deploy.loads import LOADS, TITLES, why_not
from toolchain.deploy.serving import Command
from toolchain.deploy.write import peers
from toolchain.formats import FORMATS
from toolchain.triton.engine_dir import read_engine_dir

MIXED = {"formats": ("nvfp4", "fp8"), "quant_algo": "MIXED_PRECISION"}
GPT_OSS = {"formats": ("mxfp4",), "quant_algo": "W4A16_MXFP4", "architecture": "GptOssForCausalLM"}


def commands(root: Path, **engine: Any) -> dict[str, Command]:
    found = peers(read_engine_dir(write_engine(root / "e", **engine)))
    return {command.runtime: command for command in found}


def option(command: Command, name: str) -> str | None:
    return command.words[command.words.index(name) + 1] if name in command.words else None


@pytest.mark.parametrize(
    ("engine", "vllm", "sglang"),
    [
        ({}, "modelopt_fp4", "modelopt_fp4"),
        ({"formats": ("fp8",), "quant_algo": "FP8"}, "modelopt", "modelopt_fp8"),
        ({"formats": ("mxfp8",), "quant_algo": "MXFP8"}, "modelopt_mxfp8", "refused"),
        (MIXED, "modelopt_mixed", "refused"),
        (GPT_OSS, None, None),  # it says what it is in config.json
        ({**GPT_OSS, "architecture": "Qwen3MoeForCausalLM"}, "refused", "refused"),
        ({"formats": ("int4_awq",), "quant_algo": "W4A16_AWQ"}, "refused", "refused"),
        ({"formats": ("fp8_block",), "quant_algo": "FP8_BLOCK_SCALES"}, "refused", "refused"),
        ({"formats": ("w4a8_awq",), "quant_algo": "W4A8_AWQ"}, "refused", "refused"),
    ],
)
def test_quantization_option(
    engine: dict[str, Any], vllm: str | None, sglang: str | None, tmp_path: Path
) -> None:
    found = commands(tmp_path, **engine)
    for runtime, wanted in (("vllm", vllm), ("sglang", sglang)):
        command = found[runtime]
        if wanted == "refused":
            assert command.words == () and command.refused
        else:
            assert command.words and option(command, "--quantization") == wanted


def test_sizes_and_limits_are_those_of_the_plan(tmp_path: Path) -> None:
    found = commands(tmp_path, tp=4, ep=4, pp=2)
    vllm, sglang = found["vllm"], found["sglang"]
    assert option(vllm, "--tensor-parallel-size") == option(sglang, "--tp-size") == "4"
    assert option(vllm, "--pipeline-parallel-size") == option(sglang, "--pp-size") == "2"
    assert option(vllm, "--max-model-len") == option(sglang, "--context-length") == "8192"
    assert option(vllm, "--max-num-seqs") == option(sglang, "--max-running-requests") == "64"
    assert "--enable-expert-parallel" in vllm.words and option(sglang, "--ep-size") == "4"
    assert "--trust-remote-code" not in (*vllm.words, *sglang.words)


@pytest.mark.parametrize(
    ("kv_cache", "vllm", "sglang"),
    [
        ("fp8", "fp8", "fp8_e4m3"),
        ("fp8_cast", "fp8", "fp8_e4m3"),
        ("none", None, None),
        ("nvfp4", None, None),
    ],
)
def test_kv_cache(kv_cache: str, vllm: str | None, sglang: str | None, tmp_path: Path) -> None:
    found = commands(tmp_path, kv_cache=kv_cache)
    assert option(found["vllm"], "--kv-cache-dtype") == vllm
    assert option(found["sglang"], "--kv-cache-dtype") == sglang


def test_a_dense_model_has_no_expert_parallelism(tmp_path: Path) -> None:
    engine = {"formats": ("fp8_per_channel_per_token",), "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    dense = commands(tmp_path / "dense", tp=2, ep=1, moe=False, **engine)["vllm"]
    assert option(dense, "--quantization") == "modelopt" and "--enable-expert-parallel" not in dense.words
    assert "dense layers only" in commands(tmp_path / "moe", **engine)["vllm"].refused


def test_every_format_has_a_command_or_a_reason() -> None:
    known = {item.quant_algo for item in FORMATS} | {"MIXED_PRECISION"}
    assert {row.quant_algo for row in LOADS} <= known
    assert all(row.source for row in LOADS)
    for runtime in TITLES:
        loaded = {row.quant_algo for row in LOADS if row.runtime == runtime}
        for item in FORMATS:
            reason = why_not(
                runtime,
                quant_algo=item.quant_algo,
                algos=frozenset({item.quant_algo}),
                architecture="GptOssForCausalLM",
                is_moe=False,
            )
            assert bool(reason) == (item.quant_algo not in loaded)
