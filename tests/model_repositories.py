"""Model repositories for tests of the lint: ours by hand, of a backend that answers nothing, and of Python models."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

IO = (
    'input [ { name: "a" data_type: TYPE_FP32 dims: [ 4 ] } ]\n'
    'output [ { name: "b" data_type: TYPE_FP32 dims: [ 4 ] } ]\n'
)
PYTHON = 'backend: "python"\n'
NULL = 'backend: "null"\n'
MODEL_PY = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        out = pb_utils.Tensor("b", np.zeros(4, np.float32))
        return [pb_utils.InferenceResponse([out]) for _ in requests]
"""
NULL_C = "int TRITONBACKEND_ModelInstanceExecute(void* i, void** r, unsigned n) { return 0; }\n"
Files = dict[str, str | bytes]


def null_backend(directory: Path) -> Path | None:
    """libtriton_null.so, a backend that loads at once and answers nothing; None without a C compiler."""
    if shutil.which("cc") is None:
        return None
    (directory / "null.c").write_text(NULL_C)
    library = directory / "libtriton_null.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, directory / "null.c"], check=True)
    return library


def write_model(
    repository: Path,
    name: str,
    config: str | bytes | None,
    files: Files | None = None,
    *,
    version: bool = True,
) -> Path:
    """A model's directory with config.pbtxt (none for None), an empty 1/ unless ``version`` is False, and ``files``."""
    model = repository / name
    model.mkdir(parents=True)
    if version:
        (model / "1").mkdir()
    if config is not None:
        (model / "config.pbtxt").write_bytes(config.encode() if isinstance(config, str) else config)
    for file, content in (files or {}).items():
        path = model / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return model


def python_model(repository: Path, name: str, more: str = "", files: Files | None = None) -> Path:
    """A Python model that answers zeros."""
    return write_model(repository, name, PYTHON + IO + more, {"1/model.py": MODEL_PY, **(files or {})})


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], version: int = -1) -> str:
    maps = [("input_map", inputs), ("output_map", outputs)]
    text = " ".join(
        f'{field} {{ key: "{key}" value: "{value}" }}'
        for field, pairs in maps
        for key, value in pairs.items()
    )
    return f'{{ model_name: "{model}" model_version: {version} {text} }}'


def ensemble(*steps: str, more: str = "", io: str = "") -> str:
    """An ensemble with input IN and output OUT of 4 floats, unless ``io`` says otherwise."""
    tensors = io or IO.replace('"a"', '"IN"').replace('"b"', '"OUT"')
    return f'platform: "ensemble"\n{tensors}{more}\nensemble_scheduling {{ step [ {", ".join(steps)} ] }}\n'
