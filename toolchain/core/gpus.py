"""Hardware facts about the GPUs that engines are planned for: the only place where they stand."""

from __future__ import annotations

import re
from dataclasses import dataclass

from toolchain.core.lookup import pick


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    title: str
    sm: int
    """CUDA SM version: 90 for Hopper, 100 for B200. 0 for a CPU."""
    memory_gib: float
    bandwidth_gb_s: float
    """Memory bandwidth in 10^9 bytes/s."""
    source: str
    """Where the figures come from."""


def _gpu(name: str, title: str, sm: int, memory_gib: float, bandwidth_gb_s: float, source: str) -> Gpu:
    return Gpu(
        name=name, title=title, sm=sm, memory_gib=memory_gib, bandwidth_gb_s=bandwidth_gb_s, source=source
    )


GPUS: tuple[Gpu, ...] = (
    _gpu("cpu", "CPU (any machine with PyTorch)", 0, 0.0, 0.0, "-"),
    _gpu("a100", "A100 SXM 80GB", 80, 80.0, 2039.0, "NVIDIA A100 data sheet"),
    _gpu("l4", "L4 24GB", 89, 24.0, 300.0, "NVIDIA L4 data sheet"),
    _gpu("l40s", "L40S 48GB", 89, 48.0, 864.0, "NVIDIA L40S data sheet"),
    _gpu("rtx4090", "GeForce RTX 4090 24GB", 89, 24.0, 1008.0, "NVIDIA RTX 4090 product page"),
    _gpu("h100", "H100 SXM 80GB", 90, 80.0, 3350.0, "NVIDIA H100 data sheet"),
    _gpu("h200", "H200 SXM 141GB", 90, 140.4, 4800.0, "NVIDIA H200 data sheet; 143771 MiB by nvidia-smi"),
    _gpu("b200", "B200 SXM 180GB", 100, 178.0, 8000.0, "NVIDIA B200 data sheet"),
    _gpu("b300", "B300 SXM 288GB", 103, 268.0, 8000.0, "NVIDIA B300 data sheet"),
    _gpu("rtx5090", "GeForce RTX 5090 32GB", 120, 32.0, 1792.0, "NVIDIA RTX 5090 product page"),
    _gpu(
        "rtxpro6000",
        "RTX PRO 6000 Blackwell 96GB",
        120,
        96.0,
        1792.0,
        "NVIDIA RTX PRO 6000 Blackwell data sheet",
    ),
    _gpu(
        "dgxspark",
        "DGX Spark GB10 128GB, shared with the CPU",
        121,
        119.2,
        273.0,
        "NVIDIA DGX Spark data sheet: 128 GB LPDDR5x",
    ),
)


def get_gpu(name: str) -> Gpu:
    """The GPU called ``name`` (case-insensitive); UsageError lists the alternatives."""
    hint = "`toolchain list gpus` shows memory and SM versions"
    return pick(GPUS, name.lower(), kind="gpu", hint=hint, code="TC-102")


def is_named(gpu: Gpu, device_name: str) -> bool:
    """Whether a driver's name of a device, such as ``NVIDIA H200`` or ``NVIDIA GeForce RTX 4090``, is this GPU's."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    name = _DRIVER_NAMES.get(gpu.name, gpu.name)
    return any(
        "".join(words[begin:end]) == name
        for begin in range(len(words))
        for end in range(begin + 1, len(words) + 1)
    )


_DRIVER_NAMES = {"dgxspark": "gb10"}
"""Where the driver calls it otherwise."""
