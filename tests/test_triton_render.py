"""Rendered repositories: readable by Triton's own protobuf, true to the engine, and never half written."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.engine_dirs import write_engine
from toolchain.core.errors import UsageError
from toolchain.triton.lint import lint_repository
from toolchain.triton.render import render_repository


def parse(repository: Path) -> Any:
    text = (repository / "tensorrt_llm" / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("target", ["local", "trtllm"])
def test_config_parses_with_tritons_protobuf_and_lints_clean(target: str, tmp_path: Path) -> None:
    repository = render_repository(write_engine(tmp_path / "e", target=target), tmp_path / "repo")
    config = parse(repository)
    assert (config.name, config.backend, config.instance_group[0].count) == ("tensorrt_llm", "python", 1)
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert lint_repository(repository) == []
    for source in (repository / "tensorrt_llm" / "1").glob("*.py"):
        ast.parse(source.read_text())


def test_both_targets_speak_the_same_inputs_and_outputs(tmp_path: Path) -> None:
    local, trtllm = (
        parse(render_repository(write_engine(tmp_path / target, target=target), tmp_path / f"r-{target}"))
        for target in ("local", "trtllm")
    )
    assert list(local.input) == list(trtllm.input)
    assert list(local.output) == list(trtllm.output)


def test_published_llmapi_names_and_types(tmp_path: Path) -> None:
    """Against the contract as TensorRT-LLM publishes it, not against our own table."""
    config = parse(render_repository(write_engine(tmp_path / "e", target="trtllm"), tmp_path / "r"))
    kinds = {
        item.name: model_config_pb2.DataType.Name(item.data_type) for item in (*config.input, *config.output)
    }
    expected = {
        "text_input": "TYPE_STRING", "streaming": "TYPE_BOOL", "sampling_param_max_tokens": "TYPE_INT32",
        "sampling_param_top_k": "TYPE_INT32", "sampling_param_best_of": "TYPE_INT32",
        "sampling_param_temperature": "TYPE_FP32", "sampling_param_top_p": "TYPE_FP32",
        "sampling_param_frequency_penalty": "TYPE_FP32", "sampling_param_presence_penalty": "TYPE_FP32",
        "sampling_param_stop": "TYPE_STRING", "sampling_param_seed": "TYPE_UINT64",
        "sampling_param_exclude_input_from_output": "TYPE_BOOL", "sampling_param_return_perf_metrics": "TYPE_BOOL",
        "return_finish_reason": "TYPE_BOOL", "return_stop_reason": "TYPE_BOOL",
        "return_cumulative_logprob": "TYPE_BOOL", "stop": "TYPE_BOOL", "text_output": "TYPE_STRING",
        "finish_reason": "TYPE_STRING", "stop_reason": "TYPE_STRING", "cumulative_logprob": "TYPE_FP32",
        "kv_cache_hit_rate": "TYPE_FP32", "arrival_time_ns": "TYPE_INT64", "total_draft_tokens": "TYPE_INT32",
    }  # fmt: skip
    assert expected.items() <= kinds.items()
    assert [item.name for item in config.input if not item.optional] == ["text_input"]


def test_model_yaml_holds_llm_arguments_path_and_triton_config(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", target="trtllm")
    repository = render_repository(engine, tmp_path / "r")
    document = yaml.safe_load((repository / "tensorrt_llm/1/model.yaml").read_text())
    assert document.pop("triton_config") == {
        "max_batch_size": 0,
        "decoupled": True,
        "cancellation_check_period_ms": 100,
    }
    assert document.pop("model") == str(engine / "checkpoint")
    assert document == yaml.safe_load((engine / "llm_args.yaml").read_text())
    text = (repository / "tensorrt_llm/config.pbtxt").read_text()
    assert "max_batch_size" not in text and "decoupled" not in text


def test_local_paths_stand_in_served_json_only(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e")
    repository = render_repository(engine, tmp_path / "r")
    served = json.loads((repository / "tensorrt_llm/1/served.json").read_text())
    assert (served["engine_dir"], served["python"]) == (str(engine), sys.executable)
    assert str(tmp_path) not in (repository / "tensorrt_llm/config.pbtxt").read_text()
    for source in (repository / "tensorrt_llm" / "1").glob("*.py"):
        assert str(tmp_path) not in source.read_text()


def test_engine_mounted_elsewhere(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", target="trtllm")
    repository = render_repository(engine, tmp_path / "r", served_engine_dir=Path("/engines/e"))
    document = yaml.safe_load((repository / "tensorrt_llm/1/model.yaml").read_text())
    assert document["model"] == "/engines/e/checkpoint"


def test_instances_get_their_gpus(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", target="trtllm")
    config = parse(render_repository(engine, tmp_path / "r", instances=2, gpu_device_ids="0,1;2,3"))
    assert config.instance_group[0].count == 2
    assert config.parameters["gpu_device_ids"].string_value == "0,1;2,3"


def test_a_result_that_fails_its_lint_is_not_left_behind(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", target="trtllm")
    with pytest.raises(Exception, match="not valid") as caught:
        render_repository(engine, tmp_path / "r", instances=3, gpu_device_ids="0;1")
    assert "TC-608" in [finding.code for finding in caught.value.findings]
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda engine: (engine / "engine.json").unlink(), "holds no engine.json"),
        (lambda engine: (engine / "engine.json").write_text('{"name": "e"}'), "lacks target, checkpoint"),
        (lambda engine: (engine / "checkpoint/config.json").unlink(), "checkpoint is gone"),
        (lambda engine: (engine / "llm_args.yaml").unlink(), "llm_args.yaml is missing"),
        (lambda engine: (engine / "llm_args.yaml").write_text("a: [1"), "not valid YAML"),
        (lambda engine: (engine / "llm_args.yaml").write_text("- 1"), "expected LLM"),
    ],
)
def test_bad_engines_are_refused_without_output(spoil: Any, message: str, tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", target="trtllm")
    spoil(engine)
    with pytest.raises(UsageError, match=message):
        render_repository(engine, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_occupied_output_needs_force(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        render_repository(engine, tmp_path / "r")
    assert (tmp_path / "r" / "mine.txt").read_text() == "precious"
    render_repository(engine, tmp_path / "r", force=True)
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["tensorrt_llm"]


@pytest.mark.parametrize(("first", "second"), [("local", "trtllm"), ("trtllm", "local"), ("local", "local")])
def test_a_repository_of_another_engine_is_not_served(first: str, second: str, tmp_path: Path) -> None:
    from toolchain.triton.engine_dir import read_engine_dir
    from toolchain.triton.freshness import refuse_stale_repository

    engine = write_engine(tmp_path / "a", target=first)
    repository = render_repository(engine, tmp_path / "repo")
    refuse_stale_repository(read_engine_dir(engine), repository)
    other = write_engine(tmp_path / "b", target=second)
    with pytest.raises(UsageError, match="was rendered for target"):
        refuse_stale_repository(read_engine_dir(other), repository)
