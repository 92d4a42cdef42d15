"""Which tritonserver is found, and clear errors where none can be had. `make tritonserver` runs the real installer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from toolchain.core.errors import ToolchainError
from toolchain.triton import install

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without what this machine has."""
    monkeypatch.delenv(install.DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)


def put_on_path(tmp_path: Path) -> Path:
    binary = tmp_path / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.touch(mode=0o755)
    return binary


def put_installed(directory: Path, python: str = THIS) -> Path:
    directory.mkdir(parents=True)
    (directory / install.MARKER).write_text(json.dumps({"python": python}))
    return directory


def test_none(tmp_path: Path) -> None:
    assert install.find_server() is None
    with pytest.raises(ToolchainError, match="no tritonserver on PATH") as caught:
        install.require_server()
    assert "make tritonserver" in caught.value.hint


def test_path_comes_before_the_default_directory_but_after_the_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_installed(tmp_path / ".cache" / "tritonserver")
    found = install.find_server()
    assert found is not None and found.binary.is_relative_to(tmp_path / ".cache")
    binary = put_on_path(tmp_path)
    found = install.find_server()
    assert found is not None and found.binary == binary and not found.environment
    monkeypatch.setenv(install.DIRECTORY_VARIABLE, str(put_installed(tmp_path / "named")))
    found = install.find_server()
    assert found is not None and found.binary.is_relative_to(tmp_path / "named")
    assert found.environ()["PATH"].startswith(str(tmp_path / "named" / "stubenv" / "bin"))


def test_installed_for_another_python(tmp_path: Path) -> None:
    put_installed(tmp_path / ".cache" / "tritonserver", python="3.8")
    with pytest.raises(ToolchainError, match=r"installed for Python 3.8, this is Python"):
        install.find_server()


def test_unfinished_directory_is_no_installation(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "tritonserver" / "srv").mkdir(parents=True)
    assert install.find_server() is None


def test_python_without_a_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "STUB_PYTHONS", ("3.8",))
    with pytest.raises(ToolchainError, match="cannot be used with Python"):
        install.install_server(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_failing_pip_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "WHEEL", "./no-such-wheel-0.0.0-py3-none-any.whl")
    with pytest.raises(ToolchainError, match=r"pip install .* failed") as caught:
        install.install_server(tmp_path / "t")
    assert "no-such-wheel" in caught.value.message
    assert not list(tmp_path.glob("*t*"))
