"""What tests of streamed checkpoints share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolchain.checkpoint import writer
from toolchain.plan.types import Plan
from toolchain.quantize.streaming import outline

SHARD_BYTES = 60_000
"""Small: q, k and v, gate and up lie in different shards."""


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of quantizing write shards of ``SHARD_BYTES``."""
    monkeypatch.setattr(writer.write_shards, "__kwdefaults__", {"shard_bytes": SHARD_BYTES})
    defaults = {**outline.make_outline.__kwdefaults__, "shard_bytes": SHARD_BYTES}
    monkeypatch.setattr(outline.make_outline, "__kwdefaults__", defaults)


def files(directory: Path) -> dict[str, bytes]:
    """All but the manifest, which tells times and memory."""
    return {
        path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "quantize.json"
    }


def hidden(directory: Path) -> list[str]:
    """Names of what is left over."""
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


CHILD = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from toolchain.plan.types import Plan
from toolchain.core.files import read_json
from toolchain.quantize.streaming import outline
from {module} import {function} as make
import modelopt.torch.quantization, modelopt.torch.export, torch, transformers
transformers.AutoConfig.from_pretrained(read_json(Path({plan!r}))["model"])
outline.make_outline.__kwdefaults__["shard_bytes"] = {shard_bytes}
plan = Plan.from_json(read_json(Path({plan!r})))
random.seed(0)
torch.set_num_threads(1)

def start(name):
    child = os.fork()
    if child == 0:
        make(plan, Path({out!r}) / name, device="cpu")
        os._exit(0)
    return child

started = time.monotonic()
assert os.waitpid(start("undisturbed"), 0)[1] == 0
seconds, kills, name = time.monotonic() - started, 0, "0"
while kills < 50:
    child = start(name)
    time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    if (Path({out!r}) / name).exists():
        name = str(kills)
if not (Path({out!r}) / name).exists():
    assert os.waitpid(start(name), 0)[1] == 0
print(kills, "kills", round(seconds, 2), "s")
"""
"""Forked from a process that has imported everything: a run takes a second or two."""


def require_same_after_kills(make: Callable[..., Any], plan: Plan, where: Path) -> None:
    """Kill runs of ``make(plan, output, device="cpu")`` at 50 random instants; each goes on from what is there, and all
    that are finished have the bytes of an undisturbed one."""
    make(plan, where / "whole", device="cpu")
    out = where / "out"
    out.mkdir()
    (where / "plan.json").write_text(json.dumps(plan.to_json()))
    script = CHILD.format(
        root=str(Path(__file__).resolve().parent.parent),
        module=make.__module__,
        function=make.__name__,
        plan=str(where / "plan.json"),
        out=str(out),
        shard_bytes=SHARD_BYTES,
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    made = [path for path in out.iterdir() if not path.name.startswith(".")]
    assert made and all(files(path) == files(where / "whole") for path in made)
    assert "50 kills" in ran.stdout
