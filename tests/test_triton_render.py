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
from toolchain.core.errors import FindingsError, UsageError
from toolchain.runtime.ways import Wish
from toolchain.triton.lint import lint_repository
from toolchain.triton.model_dir import version_options_of
from toolchain.triton.render import render_repository
from toolchain.triton.served import QueueLimits


def parse(repository: Path, model: str = "tensorrt_llm") -> Any:
    text = (repository / model / "config.pbtxt").read_text()
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
    refuse_stale_repository({"tensorrt_llm": read_engine_dir(engine)}, repository)
    other = write_engine(tmp_path / "b", target=second)
    with pytest.raises(UsageError, match="was rendered for target"):
        refuse_stale_repository({"tensorrt_llm": read_engine_dir(other)}, repository)
    both = {path.name: read_engine_dir(path) for path in (engine, other)}
    with pytest.raises(UsageError, match=r"holds tensorrt_llm; expected a, b"):
        refuse_stale_repository(both, repository)


def test_several_engines_are_models_named_after_themselves(tmp_path: Path) -> None:
    engines = [
        write_engine(tmp_path / name, target=target) for name, target in (("a", "local"), ("b", "trtllm"))
    ]
    repository = render_repository(engines, tmp_path / "r")
    assert sorted(path.name for path in repository.iterdir()) == ["a", "b"]
    assert lint_repository(repository) == []
    assert [parse(repository, name).name for name in ("a", "b")] == ["a", "b"]
    assert json.loads((repository / "a/1/served.json").read_text())["engine_dir"] == str(engines[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "one"}, "one model name, one, for 2 engines"),
        ({"served_engine_dir": Path("/e")}, "one served engine directory"),
        ({"instances": 0}, "with 0 instances"),
        ({"versions": "newest"}, "latest:N, all, or numbers"),
    ],
)
def test_options_that_fit_no_two_engines(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    engines = [write_engine(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(UsageError, match=message):
        render_repository(engines, tmp_path / "r", **options)
    with pytest.raises(UsageError, match="cannot be told apart"):
        render_repository([engines[0], engines[0]], tmp_path / "r")
    with pytest.raises(UsageError, match=r"model name '\.\./a'"):
        render_repository(engines[0], tmp_path / "r", model_name="../a")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ("latest:1", "latest {\n  num_versions: 1\n}\n"),
        ("latest:2", "latest {\n  num_versions: 2\n}\n"),
        ("all", "all {\n}\n"),
        ("3,1", "specific {\n  versions: 1\n  versions: 3\n}\n"),
    ],
)
def test_version_policy(versions: str, expected: str, tmp_path: Path) -> None:
    repository = render_repository(write_engine(tmp_path / "e"), tmp_path / "r", versions=versions)
    assert str(parse(repository).version_policy) == expected


def test_local_engines_have_several_instances_with_or_without_gpus(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e")
    config = parse(render_repository(engine, tmp_path / "r", instances=3))
    assert config.instance_group[0].count == 3 and not config.parameters
    config = parse(render_repository(engine, tmp_path / "g", instances=2, gpu_device_ids="0;1"))
    assert config.parameters["gpu_device_ids"].string_value == "0;1"
    with pytest.raises(FindingsError, match="not valid"):
        render_repository(engine, tmp_path / "x", instances=2, gpu_device_ids="0")


def test_kernels_and_kv_cache_belong_to_the_version_and_to_target_local(tmp_path: Path) -> None:
    wish = Wish(kernels="off", kv_layout="static")
    repository = render_repository(write_engine(tmp_path / "e"), tmp_path / "r", wish=wish)
    version = repository / "tensorrt_llm" / "1"
    served = json.loads((version / "served.json").read_text())
    assert (served["kernels"], served["kv_layout"]) == ("off", "static") and "kv_cache" not in served
    assert version_options_of(version).wish == wish  # what an update writes again
    assert lint_repository(repository) == []
    other = write_engine(tmp_path / "t", target="trtllm")
    options: list[dict[str, Any]] = [{"wish": wish}, {"queue_limits": QueueLimits(max_waiting=1)}]
    for given in options:
        with pytest.raises(UsageError, match="target trtllm") as raised:
            render_repository(other, tmp_path / "x", **given)
        assert raised.value.code == "TC-618" and not (tmp_path / "x").exists()


def test_queue_limits_and_warmup_belong_to_the_version(tmp_path: Path) -> None:
    limits = QueueLimits(max_waiting=7, max_queue_s=1.5)
    repository = render_repository(
        write_engine(tmp_path / "e"), tmp_path / "r", queue_limits=limits, warmup_requests=4
    )
    served = json.loads((repository / "tensorrt_llm/1/served.json").read_text())
    assert (served["max_waiting"], served["max_queue_s"], served["warmup_requests"]) == (7, 1.5, 4)
    assert "max_waiting_tokens" not in served
