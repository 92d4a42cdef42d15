"""The engine process with the model that computes nothing.

noop_worker PACE_S[,PREFILL_S] -m toolchain.runtime.worker ENGINE ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.triton_cost.noop_model import noop_engine
from toolchain.runtime import worker


def main() -> int:
    times, arguments = [float(part) for part in sys.argv[1].split(",")], sys.argv[2:]

    def load(path: Any, *, max_batch_size: int | None = None, **options: Any) -> Any:
        return noop_engine(str(path), times[0], max_batch_size or 8, prefill_s=times[-1])

    worker.LocalEngine.load = load  # type: ignore[method-assign, assignment]
    return worker.main(arguments[arguments.index("toolchain.runtime.worker") + 1 :])


def write_python(path: Path, times: str) -> str:
    """An executable at ``path`` to give to ``render_repository(python=...)``: what it starts is this worker."""
    root = Path(__file__).parents[2]
    words = f'"{sys.executable}" -m benchmarks.triton_cost.noop_worker {times}'
    path.write_text(f'#!/bin/sh\ncd "{root}"\nexec {words} "$@"\n')
    path.chmod(0o755)
    return str(path)


if __name__ == "__main__":
    raise SystemExit(main())
