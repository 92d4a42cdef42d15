"""Finds a tritonserver, or installs one beside the project for machines without NVIDIA's containers.

The wheel ``nvidia-pytriton`` carries a real ``tritonserver`` with the Python backend. It is unpacked into a
directory of its own: installed normally it would pin numpy < 2 and an old tritonclient into the project's
environment.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_directory, atomic_write_json
from toolchain.core.progress import Progress, Silent

WHEEL = "nvidia-pytriton==0.7.0"
"""tritonserver 2.51.0. Later wheels were not tried."""
STUB_NUMPY = "numpy<2"
"""With numpy 2 the 2.51 stub loads models, then answers garbage or ends."""
STUB_PYTHONS = ("3.11", "3.12")
"""Versions that the project, the wheel's stubs and numpy 1.26 share."""
DEFAULT_DIRECTORY = Path(".cache/tritonserver")
DIRECTORY_VARIABLE = "TOOLCHAIN_TRITONSERVER"
MARKER = "install.json"


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A tritonserver and what it needs around it."""

    binary: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to set for it. PATH is put in front of the present one, LD_LIBRARY_PATH too."""
    description: str = ""

    def environ(self) -> dict[str, str]:
        """The whole environment for the process."""
        merged = dict(os.environ)
        for key, value in self.environment.items():
            merged[key] = os.pathsep.join(part for part in (value, os.environ.get(key, "")) if part)
        return merged


def server_directory() -> Path:
    """Where ``make tritonserver`` installs: $TOOLCHAIN_TRITONSERVER, else .cache/tritonserver."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or DEFAULT_DIRECTORY).absolute()


def find_server() -> Installation | None:
    """The installed tritonserver: the directory that the environment names, PATH, then the default
    directory."""
    own = _own_installation(server_directory())
    if own is not None and os.environ.get(DIRECTORY_VARIABLE):
        return own
    on_path = shutil.which("tritonserver")
    if on_path:
        return Installation(binary=Path(on_path), description=f"tritonserver on PATH ({on_path})")
    return own


def require_server() -> Installation:
    """``find_server``, or a ToolchainError that says how to get one."""
    found = find_server()
    if found is None:
        raise ToolchainError(
            f"no tritonserver on PATH and none in {server_directory()}",
            hint="`make tritonserver` installs one (220 MB), or use NVIDIA's Triton container",
            code="TC-620",
        )
    return found


def _own_installation(directory: Path) -> Installation | None:
    if not (directory / MARKER).is_file():
        return None
    made_for = json.loads((directory / MARKER).read_text(encoding="utf-8"))["python"]
    if made_for != _python_version():
        raise ToolchainError(
            f"{directory} was installed for Python {made_for}, this is Python {_python_version()}",
            hint=f"remove {directory} and run `make tritonserver` again",
            code="TC-620",
        )
    triton = directory / "srv" / "pytriton" / "tritonserver"
    return Installation(
        binary=triton / "bin" / "tritonserver",
        arguments=(f"--backend-directory={triton / 'backends'}", f"--cache-directory={triton / 'caches'}"),
        environment={"PATH": str(directory / "stubenv" / "bin"), "LD_LIBRARY_PATH": _libpython_directory()},
        description=f"tritonserver of {WHEEL} ({directory})",
    )


def install_server(
    target_dir: Path | None = None, progress: Progress | None = None, *, force: bool = False
) -> Path:
    """Install into ``target_dir`` (default: ``server_directory()``); nothing to do when it is there already.

    Raises ToolchainError when this Python is not served by the wheel, has no shared libpython, or pip fails.
    """
    progress = progress or Silent()
    target = (target_dir or server_directory()).absolute()
    if (target / MARKER).is_file() and not force:
        progress.note(f"{target} is installed already")
        return target
    _check_python()
    with atomic_directory(target, force=force) as partial:
        progress.note(f"downloading {WHEEL}")
        _pip("--no-deps", "--target", str(partial / "srv"), WHEEL)
        triton = partial / "srv" / "pytriton" / "tritonserver"
        stub = triton / "python_backend_stubs" / _python_version() / "triton_python_backend_stub"
        if not stub.is_file():
            raise ToolchainError(f"{WHEEL} has no Python {_python_version()} stub", code="TC-621")
        shutil.copy2(stub, triton / "backends" / "python" / stub.name)
        progress.note(f"an environment for the Python stub with {STUB_NUMPY}")
        venv.create(partial / "stubenv", with_pip=False, symlinks=True)
        packages = partial / "stubenv" / "lib" / f"python{_python_version()}" / "site-packages"
        _pip("--only-binary", ":all:", "--target", str(packages), STUB_NUMPY)
        atomic_write_json(
            partial / MARKER, {"wheel": WHEEL, "python": _python_version(), "numpy": STUB_NUMPY}
        )
    return target


def _check_python() -> None:
    version = _python_version()
    if version not in STUB_PYTHONS:
        raise ToolchainError(
            f"{WHEEL} cannot be used with Python {version}; expected one of {', '.join(STUB_PYTHONS)}",
            hint="make the environment with such a Python, or use NVIDIA's Triton container",
            code="TC-621",
        )
    _libpython_directory()


def _libpython_directory() -> str:
    """Directory of the shared libpython of this version, empty when the loader finds it by itself.

    The stub is linked against it; its major.minor must be that of the stub's environment.
    """
    library = f"libpython{_python_version()}.so.1.0"
    directory = sysconfig.get_config_var("LIBDIR") or ""
    if (Path(directory) / library).is_file():
        return str(directory)
    try:
        ctypes.CDLL(library)
    except OSError as error:
        raise ToolchainError(
            f"{library} was found neither in {directory} nor by the loader: this Python was built without it",
            hint=f"install the package libpython{_python_version()} or a Python built with --enable-shared",
            code="TC-621",
        ) from error
    return ""


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise ToolchainError(
            f"`pip install {' '.join(arguments)}` failed:\n{last}",
            hint="check the network and the package index that pip is configured with",
            code="TC-621",
        )
