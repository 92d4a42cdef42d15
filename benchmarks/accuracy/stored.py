"""What a checkpoint stores: which modules are quantized and in how many bits, from the headers of its files."""

from __future__ import annotations

import hashlib
import json
import struct
from math import prod
from pathlib import Path
from typing import Any

MARKS = ("weight_scale", "weight_packed", "weight_global_scale")
"""A module with one of these is quantized; ModelOpt's and compressed-tensors' names."""
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
Headers = dict[str, dict[str, Any]]


def read_headers(directory: Path) -> Headers:
    """Tensor name -> header entry, over all safetensors files of ``directory``."""
    found: Headers = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            found |= json.loads(file.read(length))
    found.pop("__metadata__", None)
    return found


def describe_stored(directory: Path, source: Path) -> dict[str, Any]:
    """Modules, parameters, effective bits (scales included) and a digest of the names of what is quantized."""
    headers, shapes = read_headers(directory), read_headers(source)
    modules = sorted({name.rpartition(".")[0] for name in headers if name.rpartition(".")[2] in MARKS})
    taken = set(modules)
    stored = sum(_bytes(entry) for name, entry in headers.items() if name.rpartition(".")[0] in taken)
    names = sorted(_hub_name(module, shapes) for module in modules)
    parameters = sum(prod(shapes[f"{name}.weight"]["shape"]) for name in names)
    return {
        "modules": len(modules),
        "parameters": parameters,
        "effective_bits": 8 * stored / parameters if parameters else None,
        "names_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()[:12],
    }


def _hub_name(module: str, shapes: Headers) -> str:
    """llm-compressor writes Mixtral's experts under the names of the others."""
    if f"{module}.weight" in shapes:
        return module
    parent, _, projection = module.rpartition(".")
    return f"{parent}.{MIXTRAL[projection]}"


def _bytes(entry: dict[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end) - int(start)
