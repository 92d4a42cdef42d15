"""Where lm-evaluation-harness is found. It brings about 35 packages (200 MB), so it is not installed with the rest."""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.metadata import version
from pathlib import Path

from toolchain.core.errors import ToolchainError

BESIDE = Path(sys.prefix) / "lm-eval"
"""Where ``make lm-eval`` puts it: beside the packages of the environment, which come first and are not changed."""
INSTALL = "`make lm-eval`, or `pip install 'toolchain[lm-eval]'`"


def require_lm_eval() -> str:
    """Make ``import lm_eval`` work and return its version. ToolchainError TC-540 when it is not installed."""
    try:
        importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise _unusable(error) from error
        _import_beside()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that it takes
    return version("lm_eval")


def _import_beside() -> None:
    if BESIDE.is_dir() and str(BESIDE) not in sys.path:
        sys.path.append(str(BESIDE))
    try:
        importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        raise _unusable(error) from error


def _unusable(error: ModuleNotFoundError) -> ToolchainError:
    return ToolchainError(
        f"tasks need lm-evaluation-harness: no module {error.name!r} here",
        hint=f"install it: {INSTALL}",
        code="TC-540",
    )
