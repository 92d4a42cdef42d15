"""python -m benchmarks.triton_cost run | table: what Triton adds to the local runtime, per token. See README.md."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.triton_cost.noop_model import noop_engine
from benchmarks.triton_cost.noop_worker import write_python

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "triton_cost.json"
TOKENS = 200
PACES_MS = (0.0, 2.0, 5.0, 10.0)
"""0: nothing but software; the others leave it time to overlap, as a real model does."""
USERS = (1, 8)
PROMPT = "def main(argument):\n    return "
Times = list[float]
"""Seconds (time.perf_counter) of one answer: when it was sent, then each response with text."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_cost", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, in turns, and write the result file")
    run.add_argument("--engine", default="engines/demo-moe-nvfp4", help="whose tokenizer is used")
    run.add_argument("--rounds", type=int, default=3)
    commands.add_parser("table", help="print the table of the result file")
    options = parser.parse_args()
    if options.command == "run":
        _run(Path(options.engine), options.rounds)
    _table(json.loads(RESULT.read_text()))


def _run(engine: Path, rounds: int) -> None:
    from toolchain.bench.environment import describe_environment
    from toolchain.core.files import atomic_write_json

    cells: dict[tuple[float, int], dict[str, list[list[Times]]]] = {}
    for round_ in range(rounds):
        for pace_ms in PACES_MS:
            print(f"round {round_ + 1}, {pace_ms:g} ms per step", file=sys.stderr, flush=True)
            for way, gaps in _measure(engine, pace_ms).items():
                for users, found in gaps.items():
                    cells.setdefault((pace_ms, users), {}).setdefault(way, []).append(found)
    rows = [_row(pace_ms, users, ways) for (pace_ms, users), ways in cells.items()]
    environment = describe_environment(engine_dir=engine, server=None)
    atomic_write_json(RESULT, {"tokens": TOKENS, "rounds": rounds, "environment": environment, "rows": rows})


def _row(pace_ms: float, users: int, ways: dict[str, list[list[Times]]]) -> dict[str, Any]:
    """Medians over all gaps of a round, then the median over rounds: a round in which the machine did something else
    does not decide."""
    row: dict[str, Any] = {"pace_ms": pace_ms, "users": users}
    for way, rounds in ways.items():
        gaps = [_gaps(answers) for answers in rounds]
        figures = {
            "itl_p50": [statistics.median(found) for found in gaps],
            "itl_mean": [statistics.fmean(found) for found in gaps],
            "itl_p99": [sorted(found)[int(len(found) * 0.99)] for found in gaps],
            "ttft": [statistics.median(times[1] - times[0] for times in answers) for answers in rounds],
        }
        row[way] = {f"{name}_ms": round(statistics.median(each) * 1e3, 3) for name, each in figures.items()}
    return row


def _measure(engine: Path, pace_ms: float) -> dict[str, dict[int, list[Times]]]:
    return {"in_process": _in_process(engine, pace_ms), "triton": _triton(engine, pace_ms)}


def _gaps(times: list[Times]) -> Times:
    return [later - earlier for answer in times for earlier, later in pairwise(answer[1:])]


def _together(users: int, ask: Callable[[Times], None]) -> list[Times]:
    """Each user asks twice: the first answer, with everything cold, is thrown away."""
    answers: list[Times] = [[] for _ in range(users)]

    def ask_twice(times: Times) -> None:
        for _ in range(2):
            times[:] = [time.perf_counter()]
            ask(times)

    threads = [threading.Thread(target=ask_twice, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _in_process(engine: Path, pace_ms: float) -> dict[int, list[Times]]:
    from toolchain.runtime.types import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    with noop_engine(str(engine), pace_ms / 1e3, 8) as runtime:

        def ask(times: Times) -> None:
            for chunk in runtime.stream(PROMPT, params):
                if chunk.text:
                    times.append(time.perf_counter())

        return {users: _together(users, ask) for users in USERS}


def _triton(engine: Path, pace_ms: float) -> dict[int, list[Times]]:
    from toolchain.triton.client import GenerateClient
    from toolchain.triton.render import render_repository
    from toolchain.triton.server import TritonServer

    with tempfile.TemporaryDirectory() as directory:
        python = write_python(Path(directory) / "python", str(pace_ms / 1e3))
        repository = render_repository(
            engine, Path(directory) / "repository", python=python, allow_unfit=True
        )
        with TritonServer(repository) as server:

            def ask(times: Times) -> None:
                inputs = {"sampling_param_max_tokens": TOKENS, "sampling_param_ignore_eos": True}
                with GenerateClient(server.grpc_url) as client:
                    for piece in client.stream(PROMPT, timeout_s=120, **inputs):
                        if piece.text:
                            times.append(piece.received_s)

            return {users: _together(users, ask) for users in USERS}


def _table(result: dict[str, Any]) -> None:
    print(
        "| model's step | users | in process: ITL p50, mean | through Triton | Triton's own: p50, mean | TTFT |"
    )
    print("|---|---|---|---|---|---|")
    for row in result["rows"]:
        here, there = row["in_process"], row["triton"]
        own = [there[name] - here[name] for name in ("itl_p50_ms", "itl_mean_ms", "ttft_ms")]
        cells = [f"{row['pace_ms']:g} ms", row["users"]]
        cells += [f"{way['itl_p50_ms']:.2f}, {way['itl_mean_ms']:.2f} ms" for way in (here, there)]
        cells += [f"{own[0]:+.2f}, {own[1]:+.2f} ms", f"{own[2]:+.2f} ms"]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
