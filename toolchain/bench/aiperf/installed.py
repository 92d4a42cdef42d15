"""Where aiperf is, and whether it is the release whose files can be read here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from toolchain.core.errors import ToolchainError

READ_VERSION = "0.13.0"
"""The release of requirements-aiperf.lock, with which export.py was checked."""
BESIDE = Path(sys.prefix) / "aiperf" / "bin" / "python"
"""Interpreter of the environment that ``make aiperf`` makes."""
CODE = "TC-711"
ASK = "import importlib.metadata as m; print(m.version('aiperf'))"


def require_aiperf(python: Path = BESIDE) -> Path:
    """The interpreter that has aiperf. ToolchainError TC-711 without one, or with another release than READ_VERSION."""
    if not python.is_file():
        raise ToolchainError(
            f"aiperf is not installed: {python} does not exist",
            hint="install it into an environment of its own (1.2 GB, once): `make aiperf`",
            code=CODE,
        )
    asked = subprocess.run(
        [str(python), "-c", ASK],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    found = asked.stdout.strip()
    if asked.returncode or not found:
        words = asked.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        raise ToolchainError(
            f"the environment of {python} has no aiperf: {words[0]}",
            hint="remove that environment and run `make aiperf`",
            code=CODE,
        )
    if found != READ_VERSION:
        raise ToolchainError(
            f"aiperf {found} is installed, expected {READ_VERSION}: its files may mean something else",
            hint="`make aiperf` installs the release of requirements-aiperf.lock",
            code=CODE,
        )
    return python
