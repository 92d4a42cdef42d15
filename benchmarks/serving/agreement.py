"""Both generators in turns on one server; one JSON with the figures of every round."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.triton_cost.noop_worker import write_python
from toolchain.bench.aiperf import run_aiperf
from toolchain.bench.aiperf.installed import READ_VERSION, require_aiperf
from toolchain.bench.ceiling import NullServer
from toolchain.bench.environment import describe_environment
from toolchain.bench.intervals import figures_of
from toolchain.bench.null_server import NAME as NULL_MODEL
from toolchain.bench.run import run_bench
from toolchain.bench.settings import Settings
from toolchain.bench.types import BenchResult
from toolchain.core.files import atomic_write_json, read_json
from toolchain.openai.server import OpenAiServer
from toolchain.openai.settings import ServedModel
from toolchain.triton.contract import MODEL_NAME
from toolchain.triton.engine_dir import read_engine_dir
from toolchain.triton.render import render_repository
from toolchain.triton.server import TritonServer

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "serving.json"
FIGURES = (
    "ttft_ms.p50", "ttft_ms.mean", "itl_ms.p50", "itl_ms.mean", "tpot_ms.p50", "tpot_ms.mean", "e2e_ms.mean",
    "output_tokens_per_s",
)  # fmt: skip
TOOLS = ("toolchain", "aiperf")
PACED = {"paced-http": "triton-http", "paced-openai": "openai"}
"""A server that computes nothing and sends a token every PACE_MS: what differs there is the generators alone."""
PACE_MS = 15.0
PACED_TRITON = "paced-triton"
"""The real tritonserver over a model that takes PACE_MS for a step and PREFILL_MS for prompts, without computing: TTFT
and ITL as a GPU has them, and neither generator takes the server's cores away."""
PREFILL_MS = 100.0
TARGETS = (*PACED, PACED_TRITON, "triton-http", "openai")


class Place(NamedTuple):
    """A server that is measured."""

    url: str
    kind: str
    """triton-http or openai."""
    model: str


def measure(
    engine: Path,
    *,
    rounds: int,
    targets: Sequence[str],
    concurrency: tuple[int, ...],
    requests: int,
    lengths: tuple[int, int],
) -> None:
    """Each round has other prompts; within a round both tools send the same ones, the other one first each time.

    What the result file holds of other targets, measured by the same aiperf with the same engine, stays in it.
    """
    require_aiperf()
    cells: list[dict[str, Any]] = []
    with _servers(engine, targets) as places:
        for round_ in range(rounds):
            settings = Settings(
                concurrency=concurrency,
                requests=requests,
                prompt_tokens=lengths[0],
                output_tokens=lengths[1],
                repeats=1,
                seed=round_,
                ceiling=False,
            )
            for name, place in places.items():
                for tool in TOOLS if round_ % 2 == 0 else TOOLS[::-1]:
                    print(f"round {round_ + 1} of {rounds}: {tool}, {name}", file=sys.stderr, flush=True)
                    result = _run(tool, place, settings, engine)
                    cells += _cells(result, name, tool, round_)
    how = {
        "rounds": rounds,
        "requests": requests,
        "prompt_tokens": lengths[0],
        "output_tokens": lengths[1],
        "load_average": os.getloadavg()[0],
    }
    kept = _kept(engine, targets)
    document = {
        "aiperf": READ_VERSION,
        "engine": engine.name,
        "targets": {**kept.get("targets", {}), **dict.fromkeys(targets, how)},
        "environment": describe_environment(engine_dir=engine, server=None),
        "cells": [*kept.get("cells", []), *cells],
    }
    atomic_write_json(RESULT, document)


def _kept(engine: Path, targets: Sequence[str]) -> dict[str, Any]:
    """The part of the result file that is about other targets; empty where it was measured with another engine."""
    found = read_json(RESULT) if RESULT.is_file() else {}
    if (found.get("aiperf"), found.get("engine")) != (READ_VERSION, engine.name):
        return {}
    return {
        "targets": {name: how for name, how in found["targets"].items() if name not in targets},
        "cells": [cell for cell in found["cells"] if cell["target"] not in targets],
    }


def _run(tool: str, place: Place, settings: Settings, engine: Path) -> BenchResult:
    if tool == "aiperf":
        return run_aiperf(
            url=place.url, target=place.kind, model=place.model, tokenizer_dir=engine, settings=settings
        )
    return run_bench(place.url, tokenizer_dir=engine, model=place.model, settings=settings)


def _cells(result: BenchResult, name: str, tool: str, round_: int) -> Iterator[dict[str, Any]]:
    for level in result.levels:
        figures: Mapping[str, float] = figures_of(level)
        yield {
            "tool": tool,
            "target": name,
            "round": round_,
            "concurrency": level.concurrency,
            "requests": level.requests,
            "errors": level.errors,
            "output_tokens": level.output_tokens,
            **{name: figures[name] for name in FIGURES if name in figures},
        }


@contextlib.contextmanager
def _servers(engine: Path, targets: Sequence[str]) -> Iterator[dict[str, Place]]:
    """Name -> where it is: of one tritonserver, and of one server that sends tokens at a known pace."""
    with tempfile.TemporaryDirectory(prefix="serving-") as directory, contextlib.ExitStack() as stack:
        places: dict[str, Place] = {}
        if set(targets) & set(PACED):
            null = NullServer("sse")
            stack.callback(null.close)
            null.pace(PACE_MS)
            url = f"http://127.0.0.1:{null.port}"
            places = {name: Place(url, PACED[name], NULL_MODEL) for name in targets if name in PACED}
        if PACED_TRITON in targets:
            python = write_python(Path(directory) / "python", f"{PACE_MS / 1e3},{PREFILL_MS / 1e3}")
            paced = render_repository(engine, Path(directory) / "paced", python=python, allow_unfit=True)
            url = stack.enter_context(TritonServer(paced)).http_url
            places[PACED_TRITON] = Place(url, "triton-http", MODEL_NAME)
        if set(targets) & {"triton-http", "openai"}:
            repository = render_repository(engine, Path(directory) / "repository", allow_unfit=True)
            server = stack.enter_context(TritonServer(repository))
            if "triton-http" in targets:
                places["triton-http"] = Place(server.http_url, "triton-http", MODEL_NAME)
            if "openai" in targets:
                models = {MODEL_NAME: ServedModel.of_engine(read_engine_dir(engine))}
                endpoint = stack.enter_context(OpenAiServer(grpc_url=server.grpc_url, models=models))
                places["openai"] = Place(endpoint.url, "openai", "")
        yield places
