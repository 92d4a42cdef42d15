"""Writes the Triton model repository of one or several engines: complete and linted under its name, or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.files import atomic_directory
from toolchain.core.findings import errors
from toolchain.evaluate.gates import require_fit
from toolchain.runtime.ways import Wish
from toolchain.triton.contract import MODEL_NAME
from toolchain.triton.engine_dir import EngineDir, read_engine_dir
from toolchain.triton.inflight import write_inflight
from toolchain.triton.lint import lint_repository
from toolchain.triton.model_dir import (
    HEADING,
    ModelOptions,
    VersionOptions,
    heading,
    refuse_instances,
    refuse_unheeded,
    write_model,
)
from toolchain.triton.served import QueueLimits
from toolchain.triton.version_policy import DEFAULT

MODEL_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names that are one directory, one part of a URL and one command-line word."""


def render_repository(
    engine_dir: Path | Sequence[Path],
    output: Path,
    *,
    force: bool = False,
    model_name: str | None = None,
    python: str | None = None,
    served_engine_dir: Path | None = None,
    instances: int = 1,
    gpu_device_ids: str = "",
    versions: str = DEFAULT,
    ready_timeout_s: int = 1800,
    queue_limits: QueueLimits | None = None,
    warmup_requests: int = 0,
    wish: Wish | None = None,
    allow_unfit: bool = False,
) -> Path:
    """Write the model repository of ``engine_dir`` (one, or several) to ``output`` and return ``output``.

    ``model_name``: of one engine; default ``tensorrt_llm``. Several engines are models named after themselves.
    ``python``, ``served_engine_dir``, ``ready_timeout_s``, ``queue_limits``, ``warmup_requests``, ``wish``: see
    VersionOptions.
    ``instances``, ``gpu_device_ids`` (``"0,1;2,3"``), ``versions``: see ModelOptions.
    ``allow_unfit``: render although an engine failed a gate of its evaluation.

    Raises UsageError for a bad engine directory, an occupied output or options that do not fit the target (TC-618),
    and FindingsError for an engine that failed its gates (TC-532) and when the result fails its own lint.
    """
    engines = [
        read_engine_dir(path) for path in ([engine_dir] if isinstance(engine_dir, Path) else engine_dir)
    ]
    for engine in engines:
        require_fit(engine.path, engine.manifest, allow_unfit=allow_unfit)
    named = name_models(engines, model_name)
    if served_engine_dir is not None and len(engines) > 1:
        raise UsageError(
            f"one served engine directory for {len(engines)} engines",
            hint="render each by itself",
            code="TC-614",
        )
    options = ModelOptions(instances=instances, gpu_device_ids=gpu_device_ids, versions=versions)
    defaults = VersionOptions()
    version_options = VersionOptions(
        python=python or defaults.python,
        served_engine_dir=served_engine_dir,
        ready_timeout_s=ready_timeout_s,
        queue_limits=queue_limits or defaults.queue_limits,
        warmup_requests=warmup_requests,
        wish=wish or defaults.wish,
    )
    for engine in engines:
        refuse_unheeded(engine, version_options)
    with atomic_directory(output, force=force) as partial:
        for name, engine in named.items():
            if engine.target == "tensorrt":
                refuse_instances(engine.target, options)
                seen = (served_engine_dir or engine.path).absolute()
                write_inflight(engine, partial, seen, heading(engine), gpu_device_ids)
            else:
                write_model(engine, partial / name, options, version_options)
        problems = errors(lint_repository(partial, check_paths=served_engine_dir is None))
        if problems:
            names = ", ".join(engine.name for engine in engines)
            raise FindingsError(f"the rendered repository of {names} is not valid", problems, code="TC-602")
    return output


def name_models(engines: Sequence[EngineDir], model_name: str | None = None) -> dict[str, EngineDir]:
    """Model name -> engine: ``tensorrt_llm`` or ``model_name`` for one, their own names for several.

    UsageError TC-614 for names that collide or are none, and for engines that no repository holds together.
    """
    if len(engines) == 1:
        named = {model_name or MODEL_NAME: engines[0]}
    elif model_name is not None:
        raise UsageError(
            f"one model name, {model_name}, for {len(engines)} engines",
            hint="several engines are models with their own names",
            code="TC-614",
        )
    else:
        named = {engine.name: engine for engine in engines}
    if len(named) != len(engines) or not engines:
        names = ", ".join(f"{engine.name} ({engine.path})" for engine in engines)
        raise UsageError(f"engines of one name cannot be told apart: {names}", code="TC-614")
    for name, engine in named.items():
        if not MODEL_NAMES.fullmatch(name):
            raise UsageError(f"model name {name!r}; expected letters, digits, dots, - and _", code="TC-614")
        if engine.target == "tensorrt" and (len(engines) > 1 or model_name is not None):
            raise UsageError(
                f"engine {engine.name} has target tensorrt, whose repository is an ensemble of four models with fixed "
                "names",
                hint="render it alone and without a model name",
                code="TC-614",
            )
    return named


def refuse_foreign_repository(output: Path, *, force: bool) -> None:
    """UsageError when ``output`` holds anything but a repository that was rendered here: it would be replaced."""
    if force or not output.exists():
        return
    paths = [path for path in output.iterdir() if path.name[0] != "."] if output.is_dir() else [output]
    foreign = sorted(path.name for path in paths if not _rendered_here(path))
    if foreign:
        raise UsageError(
            f"{output} is no Triton repository that was rendered here (it holds {', '.join(foreign[:3])})",
            hint="choose another directory for the repository, or pass --force to replace it",
            code="TC-004",
        )


def _rendered_here(model_dir: Path) -> bool:
    config = model_dir / "config.pbtxt"
    return config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(HEADING)
