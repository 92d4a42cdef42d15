"""One model directory of a repository: config.pbtxt, and version directories that hold all that one engine needs."""

from __future__ import annotations

import contextlib
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.runtime.ways import Wish
from toolchain.triton.contract import INPUTS, MODEL_NAME, OUTPUTS
from toolchain.triton.engine_dir import EngineDir
from toolchain.triton.served import (
    CANCELLATION_CHECK_PERIOD_MS,
    SERVED,
    QueueLimits,
    read_served,
    write_served,
)
from toolchain.triton.version_policy import DEFAULT, set_version_policy

TEMPLATES = Path(__file__).parent / "templates"
PROBED_INPUT = "sampling_param_max_tokens"
"""By which a model with the tensors of ``contract.py`` is known."""
HEADING = "# Rendered by `toolchain triton`"


@dataclass(frozen=True, kw_only=True)
class VersionOptions:
    """What belongs to one version, beside its engine."""

    python: str = sys.executable
    """Interpreter of the engine process, target ``local``."""
    served_engine_dir: Path | None = None
    """Where the server sees the engine, when that is elsewhere (a mount in a container)."""
    ready_timeout_s: int = 1800
    """Target ``local``: how long loading the engine and its warm-up may take."""
    queue_limits: QueueLimits = field(default_factory=QueueLimits)
    wish: Wish = field(default_factory=Wish)
    """Target ``local``: kernels and KV cache of the engine process."""
    warmup_requests: int = 0
    """Target ``local``: inferences that the engine process runs before it reports ready."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What all versions of a model share."""

    instances: int = 1
    gpu_device_ids: str = ""
    """GPUs of each instance, such as ``0,1;2,3``."""
    versions: str = DEFAULT


def write_model(
    engine: EngineDir, model_dir: Path, options: ModelOptions, version_options: VersionOptions
) -> None:
    """Write a model with ``engine`` as version 1. ``model_dir`` must not exist; its name is the model's."""
    refuse_instances(engine.target, options)
    write_version(engine, model_dir / "1", version_options)
    config = _model_config(model_dir.name)
    config.instance_group[0].count = options.instances
    if options.gpu_device_ids:
        config.parameters["gpu_device_ids"].string_value = options.gpu_device_ids
    if engine.target == "local":  # the llmapi layout takes it from model.yaml
        config.model_transaction_policy.decoupled = True
    set_version_policy(config, options.versions)
    write_config(config, engine, model_dir)


def write_version(engine: EngineDir, version_dir: Path, options: VersionOptions) -> None:
    """Write the files of one version, which then serves ``engine``; config.pbtxt stays as it is."""
    seen = (options.served_engine_dir or engine.path).absolute()
    version_dir.mkdir(parents=True)
    for folder in ("shared", engine.target):
        for source in sorted((TEMPLATES / folder).glob("*.py")):
            shutil.copyfile(source, version_dir / source.name)
    if engine.target == "local":
        write_served(
            version_dir,
            engine_dir=seen,
            python=options.python,
            ready_timeout_s=options.ready_timeout_s,
            limits=options.queue_limits,
            wish=options.wish,
            warmup_requests=options.warmup_requests,
        )
    else:
        _write_model_yaml(engine, version_dir / "model.yaml", seen)


def version_options_of(version_dir: Path) -> VersionOptions:
    """What ``version_dir`` was written with, for another version that shall be like it. Defaults for what is not there:
    target ``trtllm`` has none of it."""
    if not (version_dir / SERVED).is_file():
        return VersionOptions()
    served = read_served(version_dir)
    known = {key: served[key] for key in ("python", "ready_timeout_s", "warmup_requests") if key in served}
    limits = {item.name: served.get(item.name) for item in fields(QueueLimits)}
    wish = {item.name: served[item.name] for item in fields(Wish) if item.name in served}
    return VersionOptions(**known, queue_limits=QueueLimits(**limits), wish=Wish(**wish))


def refuse_instances(target: str, options: ModelOptions) -> None:
    """UsageError TC-608 for a number of instances that is none, or that the target does not have."""
    if options.instances < 1 or (target == "tensorrt" and options.instances != 1):
        raise UsageError(
            f"target {target} with {options.instances} instances",
            hint="targets local and trtllm have several, each with an engine of its own; tensorrt has one",
            code="TC-608",
        )


def refuse_unheeded(engine: EngineDir, options: VersionOptions) -> None:
    """UsageError TC-618 for what only the engine process of target ``local`` could heed."""
    if engine.target == "local":
        return
    defaults = VersionOptions()
    for name, given in (("queue limits", options.queue_limits), ("kernels or a KV cache", options.wish)):
        if given not in (defaults.queue_limits, defaults.wish):
            raise UsageError(
                f"{name} for engine {engine.name} of target {engine.target}, which would not heed them",
                hint="they are options of target local; TensorRT-LLM has its own in the engine's llm_args.yaml",
                code="TC-618",
            )


def heading(engine: EngineDir) -> str:
    """First line of a config.pbtxt, by which what was rendered here is known again."""
    return f"{HEADING} for engine {engine.name} (target {engine.target}).\n"


def write_config(config: Any, engine: EngineDir, model_dir: Path) -> None:
    """Write config.pbtxt of a model, with the heading."""
    from google.protobuf import text_format

    text = heading(engine) + text_format.MessageToString(config)
    (model_dir / "config.pbtxt").write_text(text, encoding="utf-8")


def read_config(model_dir: Path) -> Any:
    """``inference.ModelConfig`` of a model directory. UsageError TC-601 for what Triton could not read."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    path = model_dir / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise UsageError(f"{path} cannot be read: {error}", code="TC-601") from error


def model_names(repository: Path) -> tuple[str, ...]:
    """The models of a repository by name: its directories, hidden ones left out."""
    return tuple(
        sorted(path.name for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    )


def text_models(repository: Path) -> tuple[str, ...]:
    """The models whose tensors are those of ``contract.py``; ``tensorrt_llm`` when that can be read of none."""
    found = []
    for name in model_names(repository):
        with contextlib.suppress(UsageError):
            if any(item.name == PROBED_INPUT for item in read_config(repository / name).input):
                found.append(name)
    return tuple(found) or (MODEL_NAME,)


def _model_config(name: str) -> Any:
    """``inference.ModelConfig`` with the contract's inputs and outputs on one instance of the Python backend.

    KIND_CPU for both targets: the stub process itself uses no GPU; the engine that it starts does.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=name, backend="python")
    for tensor in INPUTS:
        config.input.add(
            name=tensor.name,
            data_type=pb.DataType.Value(tensor.data_type),
            dims=tensor.dims,
            optional=tensor.optional,
        )
    for tensor in OUTPUTS:
        config.output.add(name=tensor.name, data_type=pb.DataType.Value(tensor.data_type), dims=tensor.dims)
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    return config


def _write_model_yaml(engine: EngineDir, path: Path, seen: Path) -> None:
    """The engine's LLM() arguments, the checkpoint's absolute path, and what Triton reads by auto-complete.

    ``max_batch_size`` 0: requests come one by one and TensorRT-LLM batches them in flight.
    """
    import yaml

    source = engine.path / "llm_args.yaml"
    if not source.is_file():
        raise UsageError(
            f"{source} is missing: target trtllm needs it", hint="build the engine again", code="TC-611"
        )
    try:
        llm_args = yaml.safe_load(source.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is not valid YAML: {error}", code="TC-611") from error
    if not isinstance(llm_args, dict):
        raise UsageError(
            f"{source} holds a {type(llm_args).__name__}, expected LLM() arguments", code="TC-611"
        )
    document = {
        **llm_args,
        "model": str(seen / engine.manifest["checkpoint"]),
        "triton_config": {
            "max_batch_size": 0,
            "decoupled": True,
            "cancellation_check_period_ms": CANCELLATION_CHECK_PERIOD_MS,
        },
    }
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
