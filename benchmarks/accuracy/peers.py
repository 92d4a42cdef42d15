"""The environment of llm-compressor: its releases need other versions of transformers than ModelOpt allows."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

from benchmarks.accuracy.places import BUILD, PEER_PYTHON

PACKAGE = "llmcompressor==0.14.0.1"


def make_environment() -> None:
    """A virtual environment with the torch build of this one: any other request would fetch CUDA's libraries."""
    if PEER_PYTHON.is_file():
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    constraints = BUILD / "constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n", encoding="utf-8")
    folder = PEER_PYTHON.parent.parent
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(PEER_PYTHON), "-m", "pip", "install", "-c", str(constraints), PACKAGE], check=True)
