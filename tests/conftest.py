"""Shared fixtures: tiny models made once per session."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import Architectures
from tests.tiny import make_tiny

# Read when a kernel is defined: before any test imports one. `make gpu-check` runs them as a GPU does.
os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What one command line did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def toolchain(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """``toolchain("plan", model, "--json")``: the real entry point, in this process."""
    from toolchain.cli.main import main

    def run(*arguments: object) -> Ran:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["toolchain", *words])
        capfd.readouterr()
        try:
            main(words)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return Ran(status=status, out=out, err=err)

    return run


@dataclass(frozen=True, kw_only=True)
class Made:
    """An engine that `toolchain engine` made of a tiny model, all of it below ``root``."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "model"

    @property
    def texts(self) -> Path:
        return self.root / "texts.txt"

    @property
    def engine(self) -> Path:
        return self.root / "engine"

    @property
    def repository(self) -> Path:
        return self.root / "repository"

    @property
    def command(self) -> tuple[object, ...]:
        """What made it; ends with --output and --triton-output."""
        texts = ("--calib-data", self.texts, "--calib-samples", 8, "--calib-length", 64, "--eval-tokens", 256)
        where = ("--output", self.engine, "--triton-output", self.repository)
        return ("engine", self.source, "--format", "nvfp4", *texts, *where)

    def copy_to(self, root: Path) -> Made:
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Made(root=root)


@pytest.fixture(scope="session")
def made(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An NVFP4 engine for the local target. Read only: copy it before changing it."""
    from toolchain.cli.main import main

    found = Made(root=tmp_path_factory.mktemp("made"))
    shutil.copytree(tiny("qwen3_moe"), found.source)
    lines = [f"def f{i}(x):\n    return x * {i} + {i % 7}  # {i:b}\n" for i in range(60)]
    found.texts.write_text("".join(lines))
    held_out = "".join(line.replace("def f", "def g") for line in lines[:20])
    (found.source / "evaluation.jsonl").write_text(json.dumps({"text": held_out}) + "\n")
    words = [str(word) for word in found.command]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["toolchain", *words])
        with pytest.raises(SystemExit) as end:
            main(words)
    assert not end.value.code
    return found


@pytest.fixture(scope="module")
def alone_with_ray() -> Iterator[None]:
    """One Ray cluster of the tests at a time: those that look for a cluster on this machine must find their own."""
    with (Path(tempfile.gettempdir()) / "toolchain-tests-ray.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny(kind)``: directory of a tiny random model of that kind. Read only: copy it before changing it."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny(kind, tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return get


@pytest.fixture(scope="session")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Architectures:
    """``architectures.get(name)``: a well-known model, read from its published config.json."""
    return Architectures(tmp_path_factory.mktemp("architectures"))
