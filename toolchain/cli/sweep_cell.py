"""The process of one cell of a sweep: the command line, until stdin is closed by whoever started it."""

from __future__ import annotations

import sys

from toolchain.cli.main import main
from toolchain.pipeline.sweep.executors import end_with

if __name__ == "__main__":
    end_with(sys.stdin.fileno())
    main()
