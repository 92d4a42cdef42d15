"""The directory that NVIDIA NIM for LLMs loads: the checkpoint's files, the environment, and what is missing.

Facts (docs.nvidia.com/nim/large-language-models): 1.x, fine-tuned and multi-LLM pages: ``NIM_MODEL_NAME`` is a
directory in Hugging Face layout with hf_quant_config.json beside config.json, served by TensorRT-LLM. 2.x, model-free
NIM and advanced configuration: ``NIM_MODEL_PATH`` is an absolute path or a URI, ``NIM_PASSTHROUGH_ARGS`` are arguments
of the backend, vLLM or SGLang; there is no TensorRT-LLM backend (release notes 2.0.1, 2.1.5).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from toolchain.core.errors import FindingsError
from toolchain.core.files import (
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    refuse_to_replace_source,
    sha256_file,
)
from toolchain.core.findings import Finding, errors
from toolchain.deploy.nim_checks import check_files, check_format, check_readable
from toolchain.deploy.serving import Checkpoint, peer_command
from toolchain.deploy.settings import read_checkpoint
from toolchain.evaluate.gates import require_fit
from toolchain.triton.engine_dir import EngineDir, read_engine_dir

MOUNT = "/opt/models"
"""Where the container sees the model; outside NIM's own cache."""
LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "quant_cfg.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
)
"""Files that NIM's backends read; records of how the checkpoint was made stay behind."""
BACKENDS = {"1": ("tensorrt_llm",), "2": ("vllm", "sglang")}
"""Major version of NIM -> backends, the first by default."""


@dataclass(frozen=True, kw_only=True)
class Nim:
    """What NIM would be given, before anything is written."""

    engine: EngineDir
    major: str
    backend: str
    environment: dict[str, str]
    files: tuple[Path, ...]
    findings: tuple[Finding, ...]

    @property
    def directory(self) -> str:
        """Of the model, inside the container."""
        return _inside(self.engine)

    @property
    def command(self) -> str:
        """``docker run``, to be started in the directory. $NIM_IMAGE is the user's: which image depends on a licence.

        As the user who runs it, as NIM's pages do: the files are theirs.
        """
        return (
            'docker run --rm --gpus all --shm-size 16g --user "$(id -u)" --env-file nim.env '
            f'--mount "type=bind,source=$PWD/model,target={self.directory},readonly" '
            '--publish 127.0.0.1:8000:8000 "$NIM_IMAGE"'
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine.name,
            "nim": f"{self.major}.x",
            "backend": self.backend,
            "environment": self.environment,
            "files": [path.name for path in self.files],
            "findings": [finding.to_json() for finding in self.findings],
            "command": self.command,
        }


def prepare_nim(engine_dir: Path, *, major: str = "2", backend: str = "", allow_unfit: bool = False) -> Nim:
    """Everything decided and checked, nothing written. ``major``: "1" or "2"."""
    engine = read_engine_dir(engine_dir)
    require_fit(engine.path, engine.manifest, allow_unfit=allow_unfit)
    chosen = backend or BACKENDS[major][0]
    checkpoint = read_checkpoint(engine, _inside(engine))
    findings = [
        *check_format(engine, checkpoint, major=major, backend=chosen, backends=BACKENDS[major]),
        *check_files(engine.checkpoint, checkpoint, major=major),
        *check_readable(engine.checkpoint),
    ]
    return Nim(
        engine=engine,
        major=major,
        backend=chosen,
        environment=_environment(checkpoint, major, chosen),
        files=tuple(_files(engine.checkpoint)),
        findings=tuple(findings),
    )


def write_nim(nim: Nim, output: Path, *, force: bool = False) -> dict[str, Any]:
    """Write ``output``: model/, nim.env, run.sh and nim.json with the hash of every file. Returns nim.json.

    Raises FindingsError where a file is missing or the format is not loaded; then nothing is written.
    """
    problems = errors(nim.findings)
    if problems:
        raise FindingsError(
            f"{nim.engine.path} is not what NIM {nim.major}.x with {nim.backend} loads",
            problems,
            hint="each finding says what to do",
            code=problems[0].code,
        )
    refuse_to_replace_source(output, nim.engine.path)
    with atomic_directory(output, force=force) as partial:
        model = partial / "model"
        model.mkdir()
        for path in nim.files:
            _link(path, model / path.name)
        environment = "".join(f"{name}={value}\n" for name, value in nim.environment.items())
        atomic_write_text(partial / "nim.env", environment)
        atomic_write_text(partial / "run.sh", _script(nim))
        (partial / "run.sh").chmod(0o755)
        record = {**nim.to_json(), "sha256": {path.name: sha256_file(path) for path in nim.files}}
        atomic_write_json(partial / "nim.json", record)
    return record


def _environment(checkpoint: Checkpoint, major: str, backend: str) -> dict[str, str]:
    """Variables of the container. The NGC key is no part of it: nothing is downloaded."""
    if major == "1":
        sizes = {"NIM_TENSOR_PARALLEL_SIZE": checkpoint.tp, "NIM_PIPELINE_PARALLEL_SIZE": checkpoint.pp}
        wanted = {**sizes, "NIM_MAX_MODEL_LEN": checkpoint.max_seq_len}
        named = {"NIM_MODEL_NAME": checkpoint.model, "NIM_SERVED_MODEL_NAME": checkpoint.name}
        return {**named, **{key: str(value) for key, value in wanted.items() if value}}
    environment = {"NIM_MODEL_PATH": checkpoint.model, "NIM_SERVED_MODEL_NAME": checkpoint.name}
    words = peer_command(backend, checkpoint).words if backend in BACKENDS["2"] else ()
    options = words[words.index(checkpoint.model) + 1 :] if words else ()
    return {**environment, "NIM_PASSTHROUGH_ARGS": shlex.join(options)} if options else environment


def _inside(engine: EngineDir) -> str:
    """Path of the model in the container, of letters that neither a shell nor --mount takes for syntax."""
    return f"{MOUNT}/{re.sub(r'[^A-Za-z0-9._-]+', '-', engine.name)}"


def _files(checkpoint: Path) -> list[Path]:
    found = (path for path in checkpoint.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in found if any(fnmatch(path.name, pattern) for pattern in LOADED))


def _script(nim: Nim) -> str:
    return (
        "#!/bin/sh\n"
        f"# NIM {nim.major}.x with {nim.backend}.\n"
        "# Not run where it was written: there was no GPU and no NIM.\n"
        "set -eu\n"
        'cd "$(dirname "$0")"\n'
        ': "${NIM_IMAGE:?name the image of NIM, with its tag}"\n'
        f"exec {nim.command}\n"
    )


def _link(source: Path, target: Path) -> None:
    """Shards are linked where the file system allows it; people edit the rest."""
    if source.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)
