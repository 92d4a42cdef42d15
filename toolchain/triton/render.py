"""Writes the Triton model repository of an engine: complete and linted under its name, or not at all."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.files import atomic_directory
from toolchain.core.findings import errors
from toolchain.evaluate.gates import require_fit
from toolchain.triton.contract import INPUTS, MODEL_NAME, OUTPUTS
from toolchain.triton.engine_dir import EngineDir, read_engine_dir
from toolchain.triton.inflight import write_inflight
from toolchain.triton.inflight_contract import MODELS as INFLIGHT_MODELS
from toolchain.triton.lint import lint_repository
from toolchain.triton.served import CANCELLATION_CHECK_PERIOD_MS, QueueLimits, write_served

TEMPLATES = Path(__file__).parent / "templates"
HEADING = "# Rendered by `toolchain triton`"


def render_repository(
    engine_dir: Path,
    output: Path,
    *,
    force: bool = False,
    python: str | None = None,
    served_engine_dir: Path | None = None,
    instances: int = 1,
    gpu_device_ids: str = "",
    ready_timeout_s: int = 1800,
    queue_limits: QueueLimits | None = None,
    allow_unfit: bool = False,
) -> Path:
    """Write the model repository of ``engine_dir`` to ``output`` and return ``output``.

    ``python``: interpreter that runs the engine process of target ``local`` (default: the running one).
    ``served_engine_dir``: where the server sees the engine, when that is elsewhere (a mount in a container).
    ``instances`` and ``gpu_device_ids`` (``"0,1;2,3"``): target ``trtllm``, one LLM per instance.
    ``ready_timeout_s``: target ``local``, how long loading the engine may take; ``queue_limits``: what it refuses.
    ``allow_unfit``: render although the engine failed a gate of its evaluation.

    Raises UsageError for a bad engine directory, an occupied output or options that do not fit the target,
    and FindingsError for an engine that failed its gates (TC-532) and when the result fails its own lint.
    """
    engine = read_engine_dir(engine_dir)
    require_fit(engine.path, engine.manifest, allow_unfit=allow_unfit)
    _refuse_instances(engine.target, instances, gpu_device_ids)
    seen_by_server = (served_engine_dir or engine.path).absolute()
    with atomic_directory(output, force=force) as partial:
        model_dir = partial / MODEL_NAME
        if engine.target == "local":
            _write_local(engine, model_dir)
            write_served(
                model_dir / "1",
                engine_dir=seen_by_server,
                python=python or sys.executable,
                ready_timeout_s=ready_timeout_s,
                limits=queue_limits or QueueLimits(),
            )
        elif engine.target == "trtllm":
            _write_trtllm(engine, model_dir, seen_by_server, instances, gpu_device_ids)
        else:
            write_inflight(engine, partial, seen_by_server, _heading(engine), gpu_device_ids)
        problems = errors(lint_repository(partial, check_paths=served_engine_dir is None))
        if problems:
            raise FindingsError(
                f"the rendered repository of {engine.name} is not valid", problems, code="TC-602"
            )
    return output


def _refuse_instances(target: str, instances: int, gpu_device_ids: str) -> None:
    """UsageError TC-608 for options that are another target's."""
    if (target != "trtllm" and instances != 1) or (target == "local" and gpu_device_ids):
        raise UsageError(
            f"target {target} runs one engine that batches by itself; got instances={instances}, "
            f"gpu_device_ids={gpu_device_ids!r}",
            hint="several instances are for target trtllm",
            code="TC-608",
        )


def refuse_foreign_repository(output: Path, *, force: bool) -> None:
    """UsageError when ``output`` holds anything but a repository that was rendered here: it would be replaced."""
    if force or not output.exists():
        return
    config = output / MODEL_NAME / "config.pbtxt"
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    known = ({MODEL_NAME}, set(INFLIGHT_MODELS))
    ours = config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(HEADING)
    if names and not (ours and names in known):
        raise UsageError(
            f"{output} is no Triton repository that was rendered here (it holds {', '.join(sorted(names)[:3])})",
            hint="choose another directory for the repository, or pass --force to replace it",
            code="TC-004",
        )


def _write_local(engine: EngineDir, model_dir: Path) -> None:
    _copy_templates("local", model_dir / "1")
    config = _model_config()
    config.model_transaction_policy.decoupled = True
    _write_config(config, engine, model_dir)


def _write_trtllm(
    engine: EngineDir, model_dir: Path, seen: Path, instances: int, gpu_device_ids: str
) -> None:
    _copy_templates("trtllm", model_dir / "1")
    config = _model_config()
    config.instance_group[0].count = instances
    if gpu_device_ids:
        config.parameters["gpu_device_ids"].string_value = gpu_device_ids
    _write_config(config, engine, model_dir)
    _write_model_yaml(engine, model_dir / "1" / "model.yaml", seen)


def _copy_templates(target: str, version_dir: Path) -> None:
    version_dir.mkdir(parents=True)
    for folder in ("shared", target):
        for source in sorted((TEMPLATES / folder).glob("*.py")):
            shutil.copyfile(source, version_dir / source.name)


def _model_config() -> Any:
    """``inference.ModelConfig`` with the contract's inputs and outputs on one instance of the Python backend.

    KIND_CPU for both targets: the stub process itself uses no GPU; the engine that it starts does.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=MODEL_NAME, backend="python")
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


def _write_config(config: Any, engine: EngineDir, model_dir: Path) -> None:
    from google.protobuf import text_format

    text = _heading(engine) + text_format.MessageToString(config)
    (model_dir / "config.pbtxt").write_text(text, encoding="utf-8")


def _heading(engine: EngineDir) -> str:
    return f"{HEADING} for engine {engine.name} (target {engine.target}).\n"


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
    checkpoint = seen / engine.manifest["checkpoint"]
    document = {
        **llm_args,
        "model": str(checkpoint),
        "triton_config": {
            "max_batch_size": 0,
            "decoupled": True,
            "cancellation_check_period_ms": CANCELLATION_CHECK_PERIOD_MS,
        },
    }
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
