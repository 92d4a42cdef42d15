"""What a tuner found, in files of an engine: one for each GPU with its versions, never written over by another.

``kernels/<gpu>-<digest>.json``. A table is only used by the GPU, the versions and the kernels that it was made with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, read_json
from toolchain.kernels.settings import Settings

SCHEMA_VERSION = 1
FOLDER = "kernels"
Table = Mapping[str, Mapping[int, Settings]]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What timings depend on."""

    gpu: str
    """Name by the driver, such as ``NVIDIA H200``."""
    capability: str
    """``9.0``."""
    processors: int
    torch: str
    triton: str
    cuda: str
    kernels: str
    """Digest of the source of this package."""

    @property
    def file(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        digest = hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:12]
        return f"{slug}-{digest}.json"


def identity_of(device: Any) -> Identity:
    """Of a torch device, a GPU or (for the interpreter) the CPU."""
    import torch
    import triton

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu, processors = properties.name, int(properties.multi_processor_count)
        capability = f"{properties.major}.{properties.minor}"
    else:
        gpu, processors, capability = "interpreter", 1, "0.0"
    return Identity(
        gpu=gpu,
        capability=capability,
        processors=processors,
        torch=torch.__version__,
        triton=triton.__version__,
        cuda=str(torch.version.cuda),
        kernels=kernels_digest(),
    )


def kernels_digest() -> str:
    """Of the source files that decide what the GPU runs."""
    found = hashlib.sha256()
    for name in (
        "attention",
        "block_scaled",
        "decode",
        "epilogue",
        "kinds",
        "launch",
        "matmul",
        "packing",
        "routing",
        "rounding",
        "settings",
        "sorting",
        "torch_grouped",
    ):
        found.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return found.hexdigest()[:16]


def write_table(directory: Path, identity: Identity, measured: Mapping[str, Any]) -> Path:
    """``measured``: key -> tokens -> settings with ``microseconds``, as ``tune.py`` gives it. Returns the file."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / identity.file
    atomic_write_json(
        file, {"schema_version": SCHEMA_VERSION, "made_on": asdict(identity), "table": measured}
    )
    return file


def read_table(directory: Path, identity: Identity) -> dict[str, dict[int, Settings]] | None:
    """The table of this GPU and these versions; None where there is none. ToolchainError TC-518 for a damaged one."""
    file = directory / FOLDER / identity.file
    if not file.is_file():
        return None
    try:
        stored = read_json(file)
        if stored["schema_version"] != SCHEMA_VERSION or stored["made_on"] != asdict(identity):
            raise ValueError("it was made for something else than its name says")
        return {
            key: {int(tokens): Settings.of_json(_fields(found)) for tokens, found in rows.items()}
            for key, rows in stored["table"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ToolchainError(
            f"{file} cannot be used: {type(error).__name__}: {error}",
            hint="remove it: the kernels are tuned again when the engine is loaded",
            code="TC-518",
        ) from error


def others(directory: Path) -> list[dict[str, Any]]:
    """``made_on`` of every table in the engine."""
    found = []
    for file in sorted((directory / FOLDER).glob("*.json")):
        stored = read_json(file)
        if isinstance(stored, dict) and isinstance(stored.get("made_on"), dict):
            found.append(stored["made_on"])
    return found


def _fields(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name in Settings.__dataclass_fields__}
