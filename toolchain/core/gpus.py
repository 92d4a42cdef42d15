"""Hardware facts about the GPUs that engines are planned for: the only place where they stand."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.errors import UsageError


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


GPUS: tuple[Gpu, ...] = (
    Gpu(name="cpu", title="CPU (any machine with PyTorch)", sm=0, memory_gib=0.0, bandwidth_gb_s=0.0, source="-"),
    Gpu(name="a100", title="A100 SXM 80GB", sm=80, memory_gib=80.0, bandwidth_gb_s=2039.0, source="NVIDIA A100 data sheet"),
    Gpu(name="l40s", title="L40S 48GB", sm=89, memory_gib=48.0, bandwidth_gb_s=864.0, source="NVIDIA L40S data sheet"),
    Gpu(name="h100", title="H100 SXM 80GB", sm=90, memory_gib=80.0, bandwidth_gb_s=3350.0, source="NVIDIA H100 data sheet"),
    Gpu(name="h200", title="H200 SXM 141GB", sm=90, memory_gib=140.4, bandwidth_gb_s=4800.0, source="NVIDIA H200 data sheet; 143771 MiB by nvidia-smi"),
    Gpu(name="b200", title="B200 SXM 180GB", sm=100, memory_gib=178.0, bandwidth_gb_s=8000.0, source="NVIDIA B200 data sheet"),
    Gpu(name="b300", title="B300 SXM 288GB", sm=103, memory_gib=268.0, bandwidth_gb_s=8000.0, source="NVIDIA B300 data sheet"),
    Gpu(name="rtx5090", title="GeForce RTX 5090 32GB", sm=120, memory_gib=32.0, bandwidth_gb_s=1792.0, source="NVIDIA RTX 5090 product page"),
)  # fmt: skip


def get_gpu(name: str) -> Gpu:
    """The GPU called ``name`` (case-insensitive); UsageError lists the alternatives."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise UsageError(
        f"unknown gpu {name!r}; known: {', '.join(gpu.name for gpu in GPUS)}",
        hint="`toolchain list gpus` shows memory and SM versions",
        code="TC-102",
    )
