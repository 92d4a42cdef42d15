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
    """``measured``: key -> tokens -> settings with ``microseconds``, as ``tune`` gives it; what else is in the file
    stays. Returns the file."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / identity.file
    stored = _stored(file, identity) if file.is_file() else None
    rows = {key: dict(found) for key, found in (stored or {}).items()}
    for key, found in measured.items():
        rows.setdefault(key, {}).update(found)
    atomic_write_json(file, {"schema_version": SCHEMA_VERSION, "made_on": asdict(identity), "table": rows})
    return file


def read_table(directory: Path, identity: Identity) -> dict[str, dict[int, Settings]] | None:
    """The table of this GPU and these versions; None where there is none. ToolchainError TC-518 for a damaged one."""
    file = directory / FOLDER / identity.file
    if not file.is_file():
        return None
    stored = _stored(file, identity)
    if stored is None:
        raise ToolchainError(
            f"{file} cannot be used: it is damaged, or was made for something else than its name says",
            hint="remove it: the kernels are tuned again when the engine is loaded",
            code="TC-518",
        )
    return settings_of(stored)


def settings_of(measured: Mapping[str, Any]) -> dict[str, dict[int, Settings]]:
    """Of a table with its measurements. KeyError, TypeError, ValueError or AttributeError for what is none."""
    fields = Settings.__dataclass_fields__
    return {
        key: {
            int(tokens): Settings.of_json({name: value for name, value in row.items() if name in fields})
            for tokens, row in rows.items()
        }
        for key, rows in measured.items()
    }


def _stored(file: Path, identity: Identity) -> dict[str, Any] | None:
    """The table in ``file``; None where it is damaged or another machine's."""
    try:
        stored = read_json(file)
        if stored["schema_version"] != SCHEMA_VERSION or stored["made_on"] != asdict(identity):
            return None
        settings_of(stored["table"])
        table: dict[str, Any] = stored["table"]
    except (ToolchainError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return table


def others(directory: Path) -> list[dict[str, Any]]:
    """``made_on`` of every table in the engine that can be read."""
    found = []
    for file in sorted((directory / FOLDER).glob("*.json")):
        try:
            stored = read_json(file)
        except (ToolchainError, OSError):
            continue
        if isinstance(stored, dict) and isinstance(stored.get("made_on"), dict):
            found.append(stored["made_on"])
    return found
