"""What is compared: one list. All quantize the routed experts to NVFP4 and keep the rest in BF16, from one source."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.places import PEER_PYTHON
from benchmarks.streaming.places import ROOT

HERE = Path(__file__).resolve().parent
OURS = (str(Path(sys.executable).with_name("toolchain")), "quantize")
EXPERTS = ("--policy", "experts-only", "--shared-experts", "bf16")


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    command: Callable[[Path, Path], tuple[str, ...]]
    """Source and output -> the process."""
    architectures: tuple[str, ...] = ("qwen3_moe", "deepseek_v3")
    sizes_gb: tuple[int, ...] = (1, 4, 16)
    least_cores: int = 1

    def covers(self, architecture: str, size_gb: int) -> bool:
        return architecture in self.architectures and size_gb in self.sizes_gb


def _ours(*words: str) -> Callable[[Path, Path], tuple[str, ...]]:
    return lambda source, output: (*OURS, str(source), *words, *EXPERTS, "--stream", "--output", str(output))


def _script(name: str, python: Path | str = sys.executable) -> Callable[[Path, Path], tuple[str, ...]]:
    return lambda source, output: (str(python), "-W", "ignore", str(HERE / name), str(source), str(output))


FLOOR = "floor"
CALIBRATION = ("--calib-data", str(ROOT / "docs"), "--calib-samples", "8", "--calib-length", "128")
METHODS = (
    Method(name="ours-nvfp4-pinned", command=_ours("--format", "nvfp4", "--recipe", "pinned")),
    Method(name="ours-w4a16_nvfp4", command=_ours("--format", "w4a16_nvfp4")),
    Method(
        name="ours-w4a16_nvfp4-window", command=_ours("--format", "w4a16_nvfp4", "--recipe", "window"), sizes_gb=(1, 4)
    ),
    # 16 GB in BF16 beside what the export copies do not fit into 24 GB of memory.
    Method(
        name="modelopt-w4a16_nvfp4",
        command=_script("modelopt_plain.py"),
        architectures=("qwen3_moe",),
        sizes_gb=(1, 4),
    ),
    # 16 GB would take it a quarter of an hour each.
    Method(
        name="llmcompressor-nvfp4a16",
        command=_script("llmcompressor_free.py", PEER_PYTHON),
        sizes_gb=(1, 4),
    ),
    Method(name="ours-nvfp4-calibrated", command=_ours("--format", "nvfp4", *CALIBRATION)),
)  # fmt: skip
BY_NAME = {method.name: method for method in METHODS}
OURS_FIRST = "ours-w4a16_nvfp4"
"""Against which the peers are measured: the same format."""
