"""Rolling update: another engine takes a model's place on a running server, and no request is lost.

The new version is written beside the old one and loaded while the old one serves. Triton sends new requests to the new
version once it is ready, lets those of the old one end, and unloads it; only then its directory is removed. For a
moment both engines are in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.core.errors import FindingsError, ToolchainError, UsageError
from toolchain.core.files import GIB
from toolchain.core.findings import errors
from toolchain.core.progress import Progress, Silent
from toolchain.evaluate.gates import require_fit
from toolchain.serve.state import server_of
from toolchain.triton.engine_dir import EngineDir, read_engine_dir
from toolchain.triton.freshness import rendered_for
from toolchain.triton.lint import lint_repository
from toolchain.triton.load import load_model
from toolchain.triton.model_dir import (
    VersionOptions,
    model_names,
    read_config,
    version_options_of,
    write_version,
)
from toolchain.triton.probes import probe_engine, read_index
from toolchain.triton.served import version_dirs
from toolchain.triton.server_log import log_end
from toolchain.triton.version_policy import serves_only_latest

POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Updated:
    model: str
    engine: str
    version: int
    replaced: tuple[int, ...]
    """Versions that were unloaded and removed; empty where the version policy keeps them."""
    load_seconds: float
    """Until the new version answered."""
    seconds: float
    """Until the old ones were gone."""


def update_model(
    engine_dir: Path,
    repository: Path,
    *,
    grpc_url: str | None = None,
    model_name: str | None = None,
    warmup_requests: int | None = None,
    timeout_s: float = 1800.0,
    allow_unfit: bool = False,
    progress: Progress | None = None,
) -> Updated:
    """Make ``engine_dir`` the newest version of a model that a server serves from ``repository``.

    ``grpc_url``: host:port of that server; by default the one that ``toolchain serve`` runs on this repository.
    ``model_name`` may be left out where the repository has one model, or one with the engine's name. What belongs to a
    version and is not given is taken over from the newest one. ``timeout_s``: for loading, and again for unloading.

    Raises UsageError for what cannot be updated so (TC-615), ToolchainError TC-616 when the new version does not load
    or does not answer (then it is removed again, and the old one goes on serving), TC-617 when the old one is not
    unloaded.
    """
    progress = progress or Silent()
    engine, model_dir, url, log_file = check_update(
        engine_dir, repository, grpc_url=grpc_url, model_name=model_name, allow_unfit=allow_unfit
    )
    started = time.monotonic()
    with _only_update(repository):
        old = [int(path.name) for path in version_dirs(model_dir)]
        number = old[-1] + 1
        _write(engine, model_dir, number, warmup_requests)
        size = sum(path.stat().st_size for path in engine.checkpoint.glob("*.safetensors")) / GIB
        progress.note(
            f"loading {engine.name} as version {number}; until it serves both are in memory: {size:.3f} GiB of weights "
            "more, and another KV cache"
        )
        try:
            load_model(url, model_dir.name, timeout_s=timeout_s)
            probe_engine(url, model_dir.name, timeout_s=timeout_s, version=str(number))
        except BaseException as error:
            _take_back(url, model_dir, number, timeout_s)
            if isinstance(error, ToolchainError):
                raise _failed(error, engine, model_dir, log_file) from error
            raise
        load_seconds = time.monotonic() - started
        replaced = tuple(old) if serves_only_latest(read_config(model_dir)) else ()
        progress.note(f"version {number} answers after {load_seconds:.1f} s")
        _await_unloaded(url, model_dir.name, replaced, timeout_s)
        for each in replaced:
            shutil.rmtree(model_dir / str(each))
    return Updated(
        model=model_dir.name,
        engine=engine.name,
        version=number,
        replaced=replaced,
        load_seconds=load_seconds,
        seconds=time.monotonic() - started,
    )


def check_update(
    engine_dir: Path,
    repository: Path,
    *,
    grpc_url: str | None = None,
    model_name: str | None = None,
    allow_unfit: bool = False,
) -> tuple[EngineDir, Path, str, Path | None]:
    """(engine, directory of its model, host:port of the server, the server's log if known); nothing is changed.

    Raises what ``update_model`` raises before it writes.
    """
    engine = read_engine_dir(engine_dir)
    require_fit(engine.path, engine.manifest, allow_unfit=allow_unfit)
    model_dir = _model_dir(repository, engine, model_name)
    url, log_file = _server(repository, grpc_url)
    _refuse(engine, model_dir)
    return engine, model_dir, url, log_file


def _model_dir(repository: Path, engine: EngineDir, model_name: str | None) -> Path:
    if not repository.is_dir():
        raise UsageError(
            f"no model repository {repository}", hint="`toolchain triton` renders it", code="TC-604"
        )
    names = model_names(repository)
    name = model_name or (names[0] if len(names) == 1 else engine.name)
    if name not in names:
        raise UsageError(
            f"{repository} has no model {name}; it has {', '.join(names) or 'none'}",
            hint="say which one is updated: --model-name",
            code="TC-615",
        )
    return repository / name


def _server(repository: Path, grpc_url: str | None) -> tuple[str, Path | None]:
    """(host:port of gRPC, the server's log where it is known)."""
    state = server_of(repository)
    if grpc_url is not None:
        return grpc_url, Path(state.log) if state is not None and state.grpc == grpc_url else None
    if state is None:
        raise UsageError(
            f"`toolchain serve` runs no server on {repository}",
            hint="name the server: --server HOST:GRPC_PORT; one that is not running needs no update: `toolchain triton "
            "ENGINE --force` renders the repository again",
            code="TC-615",
        )
    return state.grpc, Path(state.log)


def _refuse(engine: EngineDir, model_dir: Path) -> None:
    """UsageError TC-615 where a newer version would not take the place of the old one."""
    target, _ = rendered_for(model_dir)
    config = read_config(model_dir)
    if target != engine.target or engine.target == "tensorrt":
        raise UsageError(
            f"model {model_dir.name} has target {target}, engine {engine.name} has target {engine.target}: both "
            "versions share one config.pbtxt, and target tensorrt is not served here",
            hint="give an engine of the same target, or render another repository",
            code="TC-615",
        )
    if config.version_policy.WhichOneof("policy_choice") == "specific":
        raise UsageError(
            f"the version policy of {model_dir.name} names its versions: a new one would not be loaded",
            hint="render the repository with --versions latest:1",
            code="TC-615",
        )


@contextlib.contextmanager
def _only_update(repository: Path) -> Iterator[None]:
    """UsageError TC-615 while another update of the same repository runs."""
    with (repository / ".update.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another update of {repository} is running", code="TC-615") from error
        yield


def _write(engine: EngineDir, model_dir: Path, number: int, warmup_requests: int | None) -> None:
    """The new version directory, complete or not at all. It is made outside the model's directory: Triton loads a model
    again when something changed there."""
    newest = version_dirs(model_dir)[-1]
    options: VersionOptions = version_options_of(newest)
    if warmup_requests is not None:
        options = replace(options, warmup_requests=warmup_requests)
    partial = model_dir.parent / f".{model_dir.name}.{number}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # At least one: a version that cannot answer must fail to load, not take over.
        write_version(engine, partial, replace(options, warmup_requests=max(1, options.warmup_requests)))
        partial.rename(model_dir / str(number))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    problems = errors(lint_repository(model_dir.parent))
    if problems:
        shutil.rmtree(model_dir / str(number))
        raise FindingsError(f"{model_dir} with version {number} would not be valid", problems, code="TC-602")


def _take_back(url: str, model_dir: Path, number: int, timeout_s: float) -> None:
    """Remove the new version; where it is loaded already, load what is left in its place."""
    shutil.rmtree(model_dir / str(number), ignore_errors=True)
    with contextlib.suppress(ToolchainError):
        states = {item.version: item.state for item in read_index(url) if item.model == model_dir.name}
        if states.get(number) == "READY":
            load_model(url, model_dir.name, timeout_s=timeout_s)


def _failed(
    error: ToolchainError, engine: EngineDir, model_dir: Path, log_file: Path | None
) -> ToolchainError:
    shown = f"\n{log_end(log_file)}" if log_file is not None and log_file.is_file() else ""
    return ToolchainError(
        f"{engine.name} does not serve as {model_dir.name}: {error.message}{shown}",
        hint="the version before goes on serving, the new one was removed",
        code="TC-616",
    )


def _await_unloaded(url: str, model: str, versions: tuple[int, ...], timeout_s: float) -> None:
    """Wait until requests of ``versions`` have ended and their engines are gone."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [
            item.version
            for item in read_index(url)
            if item.model == model and item.version in versions and item.state in ("READY", "UNLOADING")
        ]
        if not left:
            return
        if time.monotonic() > deadline:
            raise ToolchainError(
                f"version {left[0]} of {model} was not unloaded within {timeout_s:g} s: requests still run on it, or "
                "its stub died under them",
                hint=f"the new version serves; remove {model}/{left[0]} from the repository yourself",
                code="TC-617",
            )
        time.sleep(POLL_S)
