"""NVFP4 on one device: GB/s from memory and from the disk. ``table.py`` projects them to larger models."""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch

from benchmarks.streaming.measure import drop_from_cache
from benchmarks.streaming.models import make_model
from benchmarks.streaming.places import DEVICE_RECORD, MODELS, SCRATCH
from toolchain.codecs import Calibrated, compiled, get_codec
from toolchain.core.files import atomic_write_json
from toolchain.modeling.loading import pick_device

EXPERT = (2048, 7168)
"""Rows and columns of an expert's matrix in DeepSeek-V3."""
LEAST_SECONDS = 2.0
BLOCK = (128, 128)


def measure(device: str, size_gb: int) -> dict[str, Any]:
    """Rates in bytes of the source per second; also written beside the other results."""
    place = pick_device(device)
    found = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        "threads": torch.get_num_threads(),
        "from_memory": {
            "qwen3_moe": _from_memory(place, fp8=False),
            "deepseek_v3": _from_memory(place, fp8=True),
        },
        "from_disk": {name: _from_disk(name, size_gb, place) for name in ("qwen3_moe", "deepseek_v3")},
    }
    atomic_write_json(DEVICE_RECORD, found)
    return found


def _from_memory(device: torch.device, *, fp8: bool) -> float:
    """Source bytes per second, both in the device's memory: BF16 weights, or FP8 blocks, to codes and scales."""
    weight = (torch.randn(EXPERT, device=device) * 0.02).to(torch.bfloat16)
    stored = (weight.float() / weight.abs().amax() * 448).to(torch.float8_e4m3fn) if fp8 else weight
    scales = torch.full(
        [size // block for size, block in zip(EXPERT, BLOCK, strict=True)], 1e-4, device=device
    )
    codec = get_codec("w4a16_nvfp4")

    def once() -> None:
        own = compiled.dequantize_fp8(stored, scales, BLOCK) if fp8 else stored
        codec.pack(own, Calibrated(weight_amax=compiled.largest_magnitude(own)))

    once()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < LEAST_SECONDS:
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return count * stored.nbytes / (time.perf_counter() - started)


def _from_disk(architecture: str, size_gb: int, device: torch.device) -> dict[str, float]:
    """The whole command without its start-up: files that the page cache does not hold, output flushed and hashed."""
    from toolchain.core.files import read_json
    from toolchain.models.reader import read_model
    from toolchain.plan.planner import make_plan
    from toolchain.plan.policy import PolicyOptions
    from toolchain.quantize.job import quantize

    source = MODELS / f"{architecture}-{size_gb}gb"
    was_there = source.is_dir()
    make_model(architecture, size_gb, source)
    drop_from_cache(source)
    plan = make_plan(
        read_model(str(source)), format="w4a16_nvfp4", policy_options=PolicyOptions(shared_experts="bf16")
    )
    output = SCRATCH / "device"
    started = time.monotonic()
    quantize(plan, output, device=str(device), stream=True, force=True)
    seconds = time.monotonic() - started
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    written = read_json(output / "quantize.json")["tensor_bytes"]
    shutil.rmtree(output)
    if not was_there:
        shutil.rmtree(source)
    return {
        "seconds": round(seconds, 2),
        "source_bytes_per_s": size / seconds,
        "output_share": written / size,
    }
