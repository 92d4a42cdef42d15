"""toolchain doctor"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import json_option
from toolchain.cli.output import GIB, emit, facts
from toolchain.core.environment import package_versions


@click.command(name="doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what this machine has (GPU, memory, versions) and what can run here."""
    value = {
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "gpus": _gpus(),
        "versions": package_versions(),
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        "can": _can(),
    }
    rows = [
        (name, "; ".join(f"{k}: {v}" for k, v in item.items()) if isinstance(item, dict) else item)
        for name, item in value.items()
    ]
    emit(value, as_json, facts(rows))


def _gpus() -> list[str]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        sm = properties.major * 10 + properties.minor
        found.append(f"{properties.name}, SM{sm}, {properties.total_memory / GIB:.1f} GiB")
    return found


def _can() -> dict[str, str]:
    from importlib.util import find_spec

    import torch

    from toolchain.core.errors import ToolchainError
    from toolchain.modeling.packed import why_no_kernels
    from toolchain.triton.install import find_server

    answers: dict[str, Any] = {
        "quantize": "yes" if find_spec("modelopt") else "no: nvidia-modelopt is not installed"
    }
    try:
        server = find_server()
        answers["serve"] = f"yes: {server.description}" if server else "no: run `make tritonserver`"
    except ToolchainError as error:
        answers["serve"] = f"no: {error.message}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = why_no_kernels(device)
    answers["packed weights"] = f"no: {why}; they are decoded" if why else "yes: fused kernels on this GPU"
    answers["trtllm"] = (
        "yes" if find_spec("tensorrt_llm") else "no: TensorRT-LLM is not installed; bundles can be built"
    )
    return answers
