"""Measure the methods on one model after the other, in turns; a model is removed before the next is made."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.streaming.measure import drop_from_cache, run_measured
from benchmarks.streaming.methods import FLOOR, HERE, METHODS, Method
from benchmarks.streaming.places import BUILD, MODELS, ROOT, RUNS, SCRATCH, run_file
from toolchain.core.errors import ToolchainError
from toolchain.core.files import lock

MAKE = "from pathlib import Path; from benchmarks.streaming.models import make_model; make_model({!r}, {}, Path({!r}))"
SMALL_GB = 1
"""Peers, which take minutes, are measured several times up to here."""
VERSIONS = ("toolchain", "torch", "numba", "transformers", "nvidia-modelopt")


def measure_model(
    architecture: str, size_gb: int, methods: list[Method], *, rounds: int, keep: bool, force: bool
) -> int:
    """One JSON for each method; returns how many failed. Measured ones are skipped, unless ``force``."""
    model = f"{architecture}-{size_gb}gb"
    todo = [m for m in methods if m.covers(architecture, size_gb)]
    todo = [m for m in todo if force or not run_file(model, m.name).is_file()]
    if not todo:
        return 0
    source = MODELS / model
    # In a process of its own: this one must stay small (see measure.py).
    subprocess.run(
        [sys.executable, "-c", MAKE.format(architecture, size_gb, str(source))], cwd=ROOT, check=True
    )
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(rounds):
        for method in todo:
            failed = any("error" in made for made in found.get(method.name, []))
            if failed or (turn and size_gb > SMALL_GB and not method.name.startswith("ours")):
                continue
            made = _once(method.command, source)
            found.setdefault(method.name, []).append(made)
            print(f"{model} {method.name} {turn + 1}/{rounds}: {_line(made)}", flush=True)
        # The same bytes without arithmetic: as much as the first of ours wrote.
        written = next(
            (made[-1].get("output_bytes") for made in found.values() if "error" not in made[-1]), None
        )
        if written:
            made = _once(_floor(written), source)
            found.setdefault(FLOOR, []).append(made)
            print(f"{model} {FLOOR} {turn + 1}/{rounds}: {_line(made)}", flush=True)
        for name, made_so_far in found.items():
            content = {"model": model, "method": name, "source_bytes": size, "rounds": made_so_far}
            _write(run_file(model, name), content)
    if not keep:
        shutil.rmtree(source)
    return sum(any("error" in made for made in results) for results in found.values())


def _once(command: Any, source: Path) -> dict[str, Any]:
    """One measurement from files that the page cache does not hold; the output is removed."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    drop_from_cache(source)
    output = SCRATCH / "output"
    # Threads as each program chooses them by default.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    made = run_measured(command(source, output), cwd=SCRATCH, environment=environment)
    written = [output] if output.is_file() else list(output.glob("*.safetensors"))
    made["output_bytes"] = sum(path.stat().st_size for path in written)
    shutil.rmtree(SCRATCH)
    return made


def _floor(size: int) -> Any:
    script = str(HERE / "floor.py")
    return lambda source, output: (sys.executable, script, str(source), str(output), str(size))


def _write(path: Path, content: dict[str, Any]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    content |= {"machine": machine, "versions": _versions()}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _line(made: dict[str, Any]) -> str:
    if "error" in made:
        return f"failed: {made['error'][-300:]}"
    cpu = made["cpu_user_s"] + made["cpu_system_s"]
    return f"{made['seconds']:.1f} s, {cpu:.1f} s of CPU, {made['peak_rss_bytes'] / 1e9:.2f} GB"


def measure_all(
    names: list[tuple[str, int]], methods: list[str], *, rounds: int, keep: bool, force: bool
) -> int:
    """How many methods failed. SystemExit when another run measures here: it would disturb both, and share a folder."""
    chosen = [method for method in METHODS if method.name in methods]
    BUILD.mkdir(parents=True, exist_ok=True)
    handle = os.open(BUILD, os.O_RDONLY)
    try:
        lock(handle, BUILD)
        return sum(
            measure_model(
                architecture, size, chosen, rounds=rounds if size < 16 else 1, keep=keep, force=force
            )
            for architecture, size in names
        )
    except ToolchainError as error:
        raise SystemExit(str(error)) from error
    finally:
        os.close(handle)
