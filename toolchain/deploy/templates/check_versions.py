#!/usr/bin/env python3
"""Refuse to serve an engine with another TensorRT-LLM than it was made for, then become the command that follows.

    check_versions.py COMMAND [ARGUMENT...]

Reads ``versions.lock.json`` of the directory that ENGINE names (default /engine). A TensorRT engine loads in no other
release, and of LLM arguments a release refuses what it does not know, after the weights were read. ``ANY_VERSION=1``
serves all the same. Needs the standard library alone: it runs inside the image that serves.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path


def problem(engine: Path) -> str:
    """What does not fit; empty when the engine may be served here."""
    lock = engine / "versions.lock.json"
    if not lock.is_file():
        return f"{lock} is missing: mount an engine of target trtllm or tensorrt at {engine}"
    wanted = json.loads(lock.read_text(encoding="utf-8")).get("tensorrt_llm")
    try:
        found = metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        return "this image has no TensorRT-LLM"
    if found != wanted:
        return f"the engine was made for TensorRT-LLM {wanted}, this image has {found}: build the image for {wanted}"
    return ""


def main() -> int:
    if len(sys.argv) < 2:
        sys.stderr.write("usage: check_versions.py COMMAND [ARGUMENT...]\n")
        return 2
    found = problem(Path(os.environ.get("ENGINE", "/engine")))
    if found and os.environ.get("ANY_VERSION") != "1":
        sys.stderr.write(f"refused: {found}\n")
        return 1
    os.execvp(sys.argv[1], sys.argv[1:])
    return 0  # this process is that command by now


if __name__ == "__main__":
    sys.exit(main())
