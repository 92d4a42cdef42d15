"""An engine process computes a small model with one thread, unless the environment says otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPORT = """
import sys, torch
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.threads import limit_threads
torch.set_num_threads(4)
with LocalEngine.load(sys.argv[1], device="cpu") as engine:
    print("threads", limit_threads(engine.model), torch.get_num_threads())
"""


def threads(model: Path, **environment: str) -> str:
    plain = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", REPORT, str(model)]
    result = subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, "threads 1 1"), ({"OMP_NUM_THREADS": "3"}, "threads 4 4")]
)
def test_a_small_model_takes_one_thread(
    tiny: Callable[[str], Path], environment: dict[str, str], expected: str
) -> None:
    assert threads(tiny("qwen3_moe"), **environment) == expected


def test_a_model_of_larger_matrices_takes_all(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from tests.tiny import make_tiny

    large = make_tiny("llama", tmp_path / "large", intermediate_size=2048)
    assert json.loads((large / "config.json").read_text())["hidden_size"] * 2048 > 2**17
    assert threads(large) == "threads 4 4"
