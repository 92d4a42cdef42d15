"""Backend and platform of a model, and the files that they read from its version directories."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolchain.core.findings import Finding
from toolchain.triton.rules.model import CONFIG, Model, read_bytes
from toolchain.triton.rules.rule import Rule

MAX_SOURCE_BYTES = 4 * 2**20
ENSEMBLE = "ensemble"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What triton-inference-server's core (``constants.h``, ``model_config_utils.cc``) or a backend's README says."""

    name: str
    platforms: tuple[str, ...] = ()
    """Values of ``platform`` that mean this backend, and that it may stand beside. None: any."""
    files: tuple[str, ...] = ()
    """Default names of the model in a version directory; one of them is enough. None: it needs none."""
    completes: bool = True
    """Whether inputs and outputs may be left to it."""


BACKENDS = (
    Backend(name="python", platforms=("python", ""), files=("model.py",)),
    Backend(name="onnxruntime", platforms=("onnxruntime_onnx", ""), files=("model.onnx",)),
    Backend(name="tensorrt", platforms=("tensorrt_plan", ""), files=("model.plan",)),
    Backend(
        name="tensorflow",
        platforms=("tensorflow_savedmodel", "tensorflow_graphdef"),
        files=("model.savedmodel", "model.graphdef"),
    ),
    Backend(
        name="pytorch",
        platforms=("pytorch_libtorch", "libtorch", "torch_aoti", ""),
        files=("model.pt", "model.pt2", "model.py"),
        completes=False,
    ),
    Backend(name="openvino", files=("model.xml",)),
    Backend(name="vllm", files=("model.json",)),
    Backend(name="dali", files=("model.dali", "dali.py")),
    Backend(
        name="fil",
        files=("xgboost.model", "xgboost.json", "xgboost.ubj", "model.txt", "checkpoint.tl", "model.pkl"),
    ),
    *(
        Backend(name=name)
        for name in ("tensorrtllm", "identity", "square", "repeat", "sequence", "dyna_sequence")
    ),
    *(Backend(name=name) for name in ("hugectr", "hps", "armnn_tflite", "paddle", "rapids", "redis")),
)
KNOWN = {backend.name: backend for backend in BACKENDS}
NO_BACKEND = Rule(
    code="TC-607",
    says="neither backend nor platform, and no file in the version directory tells it",
    server="refuses",
    hint='expected for instance `backend: "python"`',
)
MISSPELT = Rule(
    code="TC-607",
    says="a backend or platform that is none, and nearly one",
    server="refuses",
    hint="check the spelling; capitals count",
)
FOREIGN = Rule(
    code="TC-607",
    severity="warning",
    says="a backend that is none of triton-inference-server's",
    server="loads it where the backend is installed",
    hint="the server needs it in its backend directory, or libtriton_NAME.so beside the model",
)
PAIR = Rule(
    code="TC-607",
    says="backend and platform that do not belong together",
    server="refuses",
    hint="give the backend alone",
)
FILE = Rule(
    code="TC-604",
    says="the file that the backend loads is missing in a version directory (model.py, model.onnx, model.json...)",
    server="refuses; the Python backend lets the request to load wait for ever",
    hint="put it there, or name another one as default_model_filename",
)
SOURCE = Rule(
    code="TC-651",
    says="model.py is no Python, or has no class TritonPythonModel",
    server="refuses",
    hint="see Triton's Python backend",
)
VLLM = Rule(
    code="TC-651",
    says="model.json of the vLLM backend is no JSON object with `model`",
    server="refuses",
    hint="its keys are vLLM's engine arguments",
)
RULES = (NO_BACKEND, MISSPELT, FOREIGN, PAIR, FILE, SOURCE, VLLM)


def backend_of(model: Model) -> str:
    """The backend as the server's core completes it; ``ensemble``, or empty where it cannot be told."""
    config = model.config
    if config.platform == ENSEMBLE:
        return ENSEMBLE
    if config.backend:
        return str(config.backend)
    versions = sorted(path for path in model.directory.iterdir() if path.is_dir())
    there = {path.name for path in versions[0].iterdir()} if versions else set()
    for backend in BACKENDS:
        if config.platform and config.platform in backend.platforms:
            return backend.name
        names = [config.default_model_filename] if config.default_model_filename else there
        if not config.platform and backend.name != "fil" and set(backend.files) & set(names):
            return backend.name
    # A model without any setting may be called NAME.BACKEND.
    bare = not (config.platform or config.default_model_filename)
    return model.name.partition(".")[2] if bare else ""


def lint_backend(model: Model, versions: list[Path]) -> Iterator[Finding]:
    """``versions``: the directories that the version policy loads."""
    config, name = model.config, backend_of(model)
    if name == ENSEMBLE:
        return
    if not name:
        near = (
            difflib.get_close_matches(config.platform.lower(), _platforms(), n=1) if config.platform else []
        )
        if near:
            yield MISSPELT.found(
                model.where("platform"), f"platform {config.platform!r}", f"nearest: {near[0]}"
            )
        else:
            said = f"platform {config.platform!r} is none" if config.platform else "no backend"
            inside = next((path for path in versions if (path / CONFIG).exists()), None)
            hint = f"{model.beside(f'{inside.name}/{CONFIG}')} is in the wrong place" if inside else ""
            yield NO_BACKEND.found(model.where("platform"), said, hint)
        return
    yield from _known(model, name, versions)
    known = KNOWN.get(name)
    if known and known.platforms and config.platform and config.platform not in known.platforms:
        message = f"platform {config.platform!r} with backend {name!r}"
        yield PAIR.found(model.where("platform"), message)
    for version in versions:
        yield from _files(model, name, version)


def _platforms() -> list[str]:
    return [ENSEMBLE, *(platform for backend in BACKENDS for platform in backend.platforms if platform)]


def _known(model: Model, name: str, versions: list[Path]) -> Iterator[Finding]:
    if name in KNOWN:
        return
    library = f"libtriton_{name}.so"
    if any((place / library).exists() for place in (model.directory, *versions)) or model.config.runtime:
        return
    near = difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.75)
    if near:
        hint = f"nearest: {near[0]}; known: {', '.join(sorted(KNOWN))}"
        yield MISSPELT.found(model.where("backend"), f"backend {name!r}", hint)
    else:
        yield FOREIGN.found(model.where("backend"), f"backend {name!r} is not known here")


def _files(model: Model, name: str, version: Path) -> Iterator[Finding]:
    config = model.config
    known = KNOWN.get(name)
    given = [config.default_model_filename] if config.default_model_filename else []
    if known:
        given += config.cc_model_filenames.values()
    names = given or list(known.files if known else ())
    place = model.beside(version.name)
    if names and name != "fil" and not any((version / item).exists() for item in names):
        yield FILE.found(f"{place}/{names[0]}", f"missing; backend {name} loads {' or '.join(names)}")
        return
    if name == "python":
        yield from _source(version / names[0], f"{place}/{names[0]}")
    elif name == "vllm":
        yield from _vllm(version / names[0], f"{place}/{names[0]}")


def _source(path: Path, where: str) -> Iterator[Finding]:
    raw, problem = read_bytes(path, where, limit=MAX_SOURCE_BYTES)
    if problem is not None:
        yield problem
        return
    try:
        tree = ast.parse(raw, filename=where)
    except SyntaxError as error:
        yield SOURCE.found(f"{where}:{error.lineno or 1}:{error.offset or 1}", f"{error.msg}")
        return
    except (ValueError, RecursionError, MemoryError) as error:
        yield SOURCE.found(where, f"cannot be parsed: {error}")
        return
    star = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))
    if not star and not re.search(rb"\bTritonPythonModel\b", raw):
        yield SOURCE.found(where, "no class TritonPythonModel")


def _vllm(path: Path, where: str) -> Iterator[Finding]:
    raw, problem = read_bytes(path, where, limit=MAX_SOURCE_BYTES)
    if problem is not None:
        yield problem
        return
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        place = f":{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        yield VLLM.found(where + place, f"no JSON: {getattr(error, 'msg', error)}")
        return
    if not isinstance(document, dict) or not isinstance(document.get("model"), str):
        yield VLLM.found(where, "no object with `model` (path or hub id)")
