"""The ``inflight_batcher_llm`` repository of a TensorRT engine: ensemble, preprocessing, tensorrt_llm, postprocessing.

Every parameter has a value or is left out; the published template leaves ``${...}`` where nobody fills it in.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from toolchain.build.tensorrt.command import ENGINE
from toolchain.core.errors import UsageError
from toolchain.core.files import read_json
from toolchain.plan.types import KV_FRACTION
from toolchain.triton import inflight_contract as contract
from toolchain.triton.engine_dir import EngineDir
from toolchain.triton.inflight_contract import Field

BACKEND = "tensorrtllm"
CANCELLATION_CHECK_PERIOD_MS = 100
MAX_QUEUE_DELAY_US = 0
"""The backend batches in flight: requests need not wait for each other before it."""
WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"
"""Where NVIDIA's containers have it (the published config.pbtxt)."""
TEMPLATES = Path(__file__).parent / "templates" / "tensorrt"


def write_inflight(
    engine: EngineDir, repository: Path, seen: Path, heading: str, gpu_device_ids: str
) -> None:
    """Write the four models of ``engine`` below ``repository``; ``seen``: where the server sees the bundle."""
    made = {
        "ensemble": _ensemble(engine),
        "preprocessing": _preprocessing(engine, seen),
        "tensorrt_llm": _backend(engine, seen, gpu_device_ids),
        "postprocessing": _postprocessing(engine, seen),
    }
    for name, config in made.items():
        version = repository / name / "1"
        version.mkdir(parents=True)
        source = TEMPLATES / name / "model.py"
        if source.is_file():
            shutil.copyfile(source, version / "model.py")
        else:
            # Triton asks for the directory, and copies of a repository lose empty ones.
            (version / ".keep").write_text("", encoding="utf-8")
        _write_config(config, repository / name / "config.pbtxt", heading)


def _write_config(config: Any, path: Path, heading: str) -> None:
    from google.protobuf import text_format

    path.write_text(heading + text_format.MessageToString(config), encoding="utf-8")


def _config(name: str, inputs: tuple[Field, ...], outputs: tuple[Field, ...], **rest: Any) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=name, **rest)
    for item in inputs:
        added = config.input.add(
            name=item.name,
            data_type=pb.DataType.Value(f"TYPE_{item.kind}"),
            dims=item.dims,
            optional=item.optional,
            allow_ragged_batch=item.ragged,
        )
        if item.scalar:
            added.reshape.SetInParent()
    for item in outputs:
        config.output.add(name=item.name, data_type=pb.DataType.Value(f"TYPE_{item.kind}"), dims=item.dims)
    return config


def _python(
    engine: EngineDir,
    name: str,
    inputs: tuple[Field, ...],
    outputs: tuple[Field, ...],
    parameters: dict[str, str],
) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    config = _config(name, inputs, outputs, backend="python", max_batch_size=_batch(engine))
    config.dynamic_batching.SetInParent()
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    _set(config, parameters)
    return config


def _set(config: Any, parameters: dict[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value


def _batch(engine: EngineDir) -> int:
    try:
        return int(engine.manifest["limits"]["max_batch_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{engine.path / 'engine.json'} has no limits.max_batch_size",
            hint="build it again",
            code="TC-611",
        ) from error


def _preprocessing(engine: EngineDir, seen: Path) -> Any:
    return _python(
        engine,
        "preprocessing",
        contract.PREPROCESSING_INPUTS,
        contract.PREPROCESSING_OUTPUTS,
        {"tokenizer_dir": str(seen / engine.manifest["checkpoint"]), "add_special_tokens": "true"},
    )


def _postprocessing(engine: EngineDir, seen: Path) -> Any:
    return _python(
        engine,
        "postprocessing",
        contract.POSTPROCESSING_INPUTS,
        contract.POSTPROCESSING_OUTPUTS,
        {"tokenizer_dir": str(seen / engine.manifest["checkpoint"]), "skip_special_tokens": "true"},
    )


def _ensemble(engine: EngineDir) -> Any:
    config = _config(
        "ensemble",
        contract.ENSEMBLE_INPUTS,
        contract.ENSEMBLE_OUTPUTS,
        platform="ensemble",
        max_batch_size=_batch(engine),
    )
    for step in contract.STEPS:
        added = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
        added.input_map.update(step.inputs)
        added.output_map.update(step.outputs)
    return config


def _backend(engine: EngineDir, seen: Path, gpu_device_ids: str) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    batch = _batch(engine)
    config = _config(
        "tensorrt_llm",
        contract.BACKEND_INPUTS,
        contract.BACKEND_OUTPUTS,
        backend=BACKEND,
        max_batch_size=batch,
    )
    config.model_transaction_policy.decoupled = True
    config.dynamic_batching.preferred_batch_size.append(batch)
    config.dynamic_batching.max_queue_delay_microseconds = MAX_QUEUE_DELAY_US
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    _set(config, _parameters(engine, seen, gpu_device_ids))
    return config


def _parameters(engine: EngineDir, seen: Path, gpu_device_ids: str) -> dict[str, str]:
    """Parameters of the backend. Prefill in chunks and reuse of blocks only where the engine was built for them."""
    record = read_json(engine.path / "trtllm_build.json")
    words = record["command"]
    paged = "true" if words[words.index("--use_paged_context_fmha") + 1] == "enable" else "false"
    config = read_json(engine.checkpoint / "config.json")
    made = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(seen / ENGINE),
        "tokenizer_dir": str(seen / engine.manifest["checkpoint"]),
        "max_beam_width": "1",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": f"{KV_FRACTION:g}",
        "enable_kv_cache_reuse": paged,
        "enable_chunked_context": paged,
        "exclude_input_in_output": "true",
        "normalize_log_probs": "true",
        "cancellation_check_period_ms": str(CANCELLATION_CHECK_PERIOD_MS),
        "executor_worker_path": WORKER,
    }
    if config.get("sliding_window"):
        made["max_attention_window_size"] = str(config["sliding_window"])
    if gpu_device_ids:
        made["gpu_device_ids"] = gpu_device_ids
    return made
