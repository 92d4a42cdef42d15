"""Shared fixtures: tiny models made once per session."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny


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


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of text to calibrate on."""
    directory = tmp_path_factory.mktemp("texts")
    lines = [f"def f{i}(x):\n    return x * {i} + {i % 7}  # {i:b}\n" for i in range(60)]
    (directory / "code.txt").write_text("".join(lines))
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny(kind)``: directory of a tiny random model of that kind. Read only: copy it before changing it."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_tiny(kind, tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return get
