"""The engine process with the model that computes nothing: noop_worker PACE_S -m toolchain.runtime.worker ENGINE ..."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.triton_cost.noop_model import noop_engine
from toolchain.runtime import worker


def main() -> int:
    pace_s, arguments = float(sys.argv[1]), sys.argv[2:]

    def load(path: Any, *, max_batch_size: int | None = None, **options: Any) -> Any:
        return noop_engine(str(path), pace_s, max_batch_size or 8)

    worker.LocalEngine.load = load  # type: ignore[method-assign, assignment]
    return worker.main(arguments[arguments.index("toolchain.runtime.worker") + 1 :])


if __name__ == "__main__":
    raise SystemExit(main())
