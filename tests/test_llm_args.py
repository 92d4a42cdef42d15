"""llm_args.yaml, its commands and its lock, for the shipped specs and for everything that can be wished."""

from __future__ import annotations

import json
import os
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.architectures import Architectures, name_of
from toolchain.build.bundle import _family, _is_moe
from toolchain.build.llmapi import argument_findings
from toolchain.build.llmapi.commands import unrecorded_options
from toolchain.build.llmapi.files import FILES, write_trtllm_files
from toolchain.core.errors import FindingsError
from toolchain.core.findings import errors
from toolchain.pipeline.planning import make_request_plan
from toolchain.pipeline.request import EngineRequest, read_spec
from toolchain.plan import Plan

ENGINES = Path(__file__).parent.parent / "engines"
SPECS = tuple(sorted(ENGINES.glob("*.yaml")))
GOLDENS = Path(__file__).parent / "golden" / "trtllm"
SHOWN = (
    "qwen3-30b-a3b-h100",
    "qwen3-235b-a22b-b200",
    "deepseek-r1-b200",
    "gpt-oss-120b-b200",
    "llama-3.3-70b-h100",
)
"""Specs whose rendered files are kept as goldens."""


def planned(spec: Path, architectures: Architectures, **changes: Any) -> Plan:
    return _planned(spec, architectures, json.dumps(changes))


@cache
def _planned(spec: Path, architectures: Architectures, changes: str) -> Plan:
    request = read_spec(spec, json.loads(changes))
    return make_request_plan(request, architectures.get(name_of(request.model)))


def written(directory: Path, plan: Plan, name: str) -> dict[str, Any]:
    """The files of target trtllm in a new ``directory``; llm_args.yaml as YAML has it."""
    directory.mkdir()
    write_trtllm_files(directory, plan, _family(plan, {}), is_moe=_is_moe(plan), name=name)
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    found: dict[str, Any] = yaml.safe_load((directory / "llm_args.yaml").read_text())
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_what_is_rendered_for_a_spec_is_what_its_release_takes(
    spec: Path, architectures: Architectures, tmp_path: Path
) -> None:
    plan = planned(spec, architectures)
    arguments = written(tmp_path / "engine", plan, spec.stem)
    assert argument_findings(arguments, plan.target_version, where="rendered") == []
    serving = plan.serving
    assert (
        arguments["tensor_parallel_size"] == serving.tp and arguments["pipeline_parallel_size"] == serving.pp
    )
    if "moe_expert_parallel_size" in arguments:
        # Mapping of TensorRT-LLM asserts moe_tp_size * moe_ep_size * moe_cluster_size == tp_size * cp_size.
        assert arguments["moe_expert_parallel_size"] * arguments["moe_tensor_parallel_size"] == serving.tp
    assert ("moe_config" in arguments) == _is_moe(plan)
    assert arguments["max_batch_size"] <= arguments["max_num_tokens"], (
        "each running request takes a token of a step"
    )
    assert arguments["cuda_graph_config"]["max_batch_size"] == arguments["max_batch_size"]
    lock = json.loads((tmp_path / "engine" / "versions.lock.json").read_text())
    assert lock["world_size"] == serving.tp * serving.pp and lock["tensorrt_llm"] == plan.target_version


@pytest.mark.parametrize("name", SHOWN)
def test_rendered_files_are_the_goldens(name: str, architectures: Architectures, tmp_path: Path) -> None:
    written(tmp_path / name, planned(ENGINES / f"{name}.yaml", architectures), name)
    for file in ("llm_args.yaml", "commands.md", "commands.json"):
        text = (tmp_path / name / file).read_text()
        golden = GOLDENS / f"{name}.{file}"
        if os.environ.get("WRITE_GOLDENS"):
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(text)
        assert text == golden.read_text(), f"{golden} differs; WRITE_GOLDENS=1 writes it"


WISHES: dict[str, Any] = {
    "eplb_slots": 288,
    "eplb_layer_updates": 2,
    "chunked_prefill": False,
    "max_num_tokens": 8192,
    "moe_backend": "WIDEEP",
    "llm_args": {
        "speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 1},
        "kv_cache_config": {"free_gpu_memory_fraction": 0.7, "tokens_per_block": 64},
        "cuda_graph_config": {"batch_sizes": [1, 2, 4, 8]},
        "stream_interval": 10,
        "torch_compile_config": None,
    },
}


def test_everything_that_can_be_wished_is_rendered(architectures: Architectures, tmp_path: Path) -> None:
    """Keys and places as ``examples/configs`` of TensorRT-LLM and its EPLB example have them."""
    spec = ENGINES / "deepseek-r1-b200.yaml"
    arguments = written(tmp_path / "engine", planned(spec, architectures, **WISHES), "all")
    assert arguments["enable_attention_dp"] is True
    assert arguments["moe_config"] == {
        "backend": "WIDEEP",
        "load_balancer": {"num_slots": 288, "layer_updates_per_iter": 2},
    }
    assert arguments["enable_chunked_prefill"] is False and arguments["max_num_tokens"] == 8192
    assert arguments["speculative_config"] == {"decoding_type": "MTP", "num_nextn_predict_layers": 1}
    # Mappings merge key by key; what is replaced is replaced whole.
    assert arguments["kv_cache_config"] == {
        "dtype": "auto",
        "free_gpu_memory_fraction": 0.7,
        "enable_block_reuse": True,
        "tokens_per_block": 64,
    }
    assert arguments["cuda_graph_config"] == {"enable_padding": True, "batch_sizes": [1, 2, 4, 8]}
    assert arguments["stream_interval"] == 10 and arguments["torch_compile_config"] is None
    text = (tmp_path / "engine" / "llm_args.yaml").read_text()
    for words in (
        "replicas of busy experts included; 2 layers",
        "asked for; ",
        "passed through",
    ):
        assert words in text.replace("\n# ", " ")


def test_nvfp4_on_hopper_gets_marlin_for_experts_and_dense_layers(
    architectures: Architectures, tmp_path: Path
) -> None:
    """Pull request 13476 of TensorRT-LLM: both are opted into, from 1.3.0rc20 on."""
    changes = {"format": "nvfp4", "kv_cache": "none", "trtllm_version": "1.3.0rc20"}
    plan = planned(ENGINES / "qwen3-30b-a3b-h100.yaml", architectures, **changes)
    assert not errors(plan.findings), plan.findings
    arguments = written(tmp_path / "engine", plan, "x")
    assert arguments["moe_config"]["backend"] == "MARLIN"
    assert arguments["nvfp4_gemm_config"] == {"allowed_backends": ["marlin"]}
    assert "checked as those of main" in (tmp_path / "engine" / "llm_args.yaml").read_text().replace(
        "\n# ", " "
    )


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ({"enable_atention_dp": True}, "TC-404", "nearest: enable_attention_dp"),
        ({"build_config": {"max_batch_size": 4}}, "TC-404", "refuses build_config"),
        ({"tensor_parallel_size": 4}, "TC-407", "use --tp"),
        ({"moe_config": {"backend": "TRTLLM"}}, "TC-407", "use --moe-backend"),
        ({"kv_cache_config": {"dtype": "fp8"}}, "TC-407", "use --kv-cache"),
        ({"kv_cache_config": {"free_gpu_memory_fraction": "most"}}, "TC-405", "a number from 0 to 1"),
        (
            {"cuda_graph_config": {"batch_sizes": [1, 2], "max_batch_size": 4}},
            "TC-405",
            "leave max_batch_size out",
        ),
        ({"speculative_config": {"decoding_type": "Eagle3", "max_draft_len": 3}}, "TC-405", "nearest: Eagle"),
    ],
)
def test_a_bad_argument_is_a_finding_of_the_plan(
    asked: dict[str, Any], code: str, words: str, architectures: Architectures, tmp_path: Path
) -> None:
    """Before any work: a plan reads no weights. And never half-written."""
    plan = planned(ENGINES / "qwen3-30b-a3b-h100.yaml", architectures, llm_args=asked)
    found = [finding for finding in errors(plan.findings) if finding.where.startswith("--llm-args")]
    assert [finding.code for finding in found] == [code] and words in f"{found[0].message}; {found[0].hint}"
    (tmp_path / "engine").mkdir()
    with pytest.raises(FindingsError) as refused:
        write_trtllm_files(tmp_path / "engine", plan, _family(plan, {}), is_moe=True, name="x")
    assert refused.value.code == "TC-404" and list((tmp_path / "engine").iterdir()) == []


def test_plan_json_keeps_arguments_that_are_keyed_by_numbers(
    architectures: Architectures, tmp_path: Path
) -> None:
    """JSON has text for keys, pydantic takes it for numbers."""
    asked = {
        "speculative_config": {
            "decoding_type": "NGram",
            "max_draft_len": 4,
            "draft_len_schedule": {1: 4, 8: 0},
        }
    }
    plan = planned(ENGINES / "qwen3-30b-a3b-h100.yaml", architectures, llm_args=asked)
    assert not errors(plan.findings)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    arguments = written(tmp_path / "engine", again, "x")
    assert arguments["speculative_config"]["draft_len_schedule"] == {"1": 4, "8": 0}


@pytest.mark.parametrize("version", ["1.0.0", "1.2.1", "1.3.0rc22", "1.4.0rc1"])
def test_commands_use_recorded_options_and_survive_a_shell(
    version: str, architectures: Architectures, tmp_path: Path
) -> None:
    plan = planned(ENGINES / "llama-3.3-70b-h100.yaml", architectures, trtllm_version=version)
    name = "it's an $engine"
    written(tmp_path / "engine", plan, name)
    document = json.loads((tmp_path / "engine" / "commands.json").read_text())
    assert document["image"].endswith(f":{version}")
    by_name = {item["name"]: item for item in document["commands"]}
    assert set(by_name) >= {
        "serve",
        "bench-dataset",
        "bench-throughput",
        "bench-latency",
        "eval-gsm8k",
        "warmup",
    }
    for item in document["commands"]:
        assert unrecorded_options(tuple(item["argv"]), version) == []
        script = item["command"].removeprefix("mkdir -p bench/trtllm && ").split(" > ")[0]
        assert shlex.split(script) == item["argv"]
        words = shlex.split(item["container"])
        assert (
            words[-1] == item["command"] and words[-3:-1] == ["bash", "-c"] and words[-4] == document["image"]
        )
        assert (
            "$PWD:/engine" in words and item["container"] in (tmp_path / "engine" / "commands.md").read_text()
        )
    assert (
        "llm_args.yaml" in by_name["serve"]["argv"] and "llm_args.yaml" in by_name["bench-throughput"]["argv"]
    )


def test_an_option_that_is_not_recorded_is_noticed() -> None:
    assert unrecorded_options(("trtllm-serve", "m", "--port", "1", "--prot", "2"), "1.2.1") == ["--prot"]
    assert unrecorded_options(("trtllm-bench", "--model", "m", "latency", "--streaming"), "1.2.1") == [
        "--streaming"
    ]
    assert unrecorded_options(("trtllm-serve", "m", "--tool_parser", "x"), "1.2.1") == ["--tool_parser"]
    assert unrecorded_options(("trtllm-serve", "m", "--tool_parser", "x"), "1.4.0rc1") == []


def test_requests_take_llm_args_from_a_spec(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("model: m\nformat: fp8\nllm_args:\n  stream_interval: 4\n")
    request: EngineRequest = read_spec(spec, {})
    assert request.llm_args == {"stream_interval": 4}
