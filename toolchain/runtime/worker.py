"""The local engine as a process of its own: ``python -m toolchain.runtime.worker ENGINE_DIR``.

Requests come as JSON lines on stdin, answers leave as JSON lines on stdout, everything else goes to stderr. A
server that cannot share our Python environment (Triton's Python backend needs numpy < 2) talks to this
process, and a crash here does not take the server down.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import IO

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Silent
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.protocol import NO_REQUEST, error_message
from toolchain.runtime.service import Service, Writer
from toolchain.runtime.threads import limit_threads
from toolchain.runtime.waiting import QueueLimits
from toolchain.runtime.warmup import warm_up
from toolchain.runtime.ways import Wish


def claim_stdout() -> IO[bytes]:
    """Take stdout for the protocol: descriptor 1 becomes stderr, also for libraries that write to it."""
    sys.stdout.flush()
    protocol = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return protocol


class _Log(Silent):
    """Notes of long work, such as tuning, in the log of the process that serves."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def _queue_limits(options: argparse.Namespace) -> QueueLimits:
    """Raises UsageError (TC-509)."""
    names = ("max_waiting", "max_waiting_tokens", "max_queue_s")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return QueueLimits(**given)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m toolchain.runtime.worker", description=__doc__)
    parser.add_argument("engine", help="engine directory or checkpoint directory")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--max-batch-size", type=int, default=None, help="at most what the engine was planned for"
    )
    parser.add_argument("--max-waiting", type=int, default=None, help="requests that wait for a free row")
    parser.add_argument(
        "--max-waiting-tokens", type=int, default=None, help="prompt tokens of all waiting requests together"
    )
    parser.add_argument("--max-queue-s", type=float, default=None, help="longest wait of one request")
    parser.add_argument("--kernels", default="auto", help="auto: fused kernels where a GPU can; off")
    parser.add_argument("--kv-cache", default="auto", help="auto, bf16 or fp8, on a GPU")
    parser.add_argument("--kv-layout", default="paged", help="paged or static, on a GPU")
    parser.add_argument("--warmup-requests", type=int, default=0, help="inferences before it is ready")
    options = parser.parse_args(arguments)
    writer = Writer(claim_stdout())
    # Ctrl-C reaches the whole process group; the parent decides how its requests end and then closes stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = LocalEngine.load(
            options.engine,
            device=options.device,
            max_batch_size=options.max_batch_size,
            queue=_queue_limits(options),
            wish=Wish(kernels=options.kernels, kv_cache=options.kv_cache, kv_layout=options.kv_layout),
            progress=_Log(),
        )
        for note in engine.notes:
            _Log().note(f"{options.engine}: {note}")
        limit_threads(engine.model)
        warm_up(engine, options.warmup_requests)
    except ToolchainError as error:
        writer.send({"op": "failed", "message": error_message(NO_REQUEST, error)["message"]})
        return 1
    except Exception as error:  # noqa: BLE001 - the parent waits for ready or failed, it reads no traceback
        writer.send({"op": "failed", "message": f"{type(error).__name__}: {error}"})
        return 1
    with engine:
        Service(engine, writer).serve(sys.stdin.buffer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
