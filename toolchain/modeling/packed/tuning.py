"""Finds the settings of a packed model's multiplications by running them, on its own weights.

Every distinct shape is run with random inputs and random experts, for each number of tokens that may come up. A
candidate that does not compile, or whose result is not the default's, is left out and counted. The two multiplications
of experts share one sorting, so that they are given the rows of a block that suit both best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.kernels.packing import Packed
from toolchain.kernels.settings import BUCKETS, Settings, Shape, bucket, candidates, default
from toolchain.kernels.table import Table
from toolchain.modeling.packed.chooser import processors_of
from toolchain.modeling.packed.experts import FusedExperts
from toolchain.modeling.packed.linear import PackedLinear

TOLERANCE = 0.02
"""Largest difference of a candidate from the default settings, as a share of the largest output: BF16 sums."""
Measure = Callable[[Callable[[], Any], torch.device], float]
Call = Callable[[torch.Tensor | None], torch.Tensor]
"""One multiplication, into a given tensor or a new one."""
Runner = Callable[[Settings], Call]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shape to tune, with the weights of one module that has it."""

    shape: Shape
    packed: Packed
    activation: Any = None
    weighted: bool = False


@dataclass(frozen=True, kw_only=True)
class Tuned:
    table: dict[str, dict[str, dict[str, Any]]]
    """``Shape.key`` -> tokens -> settings, ``microseconds`` and those of the default settings."""
    tried: int
    failed: int
    """Candidates that did not compile, or gave something else."""
    seconds: float


def jobs_of(model: nn.Module) -> list[tuple[Job, ...]]:
    """One for each distinct shape, in the order of the model; together those that share one sorting."""
    found: dict[tuple[str, ...], tuple[Job, ...]] = {}
    for module in model.modules():
        jobs: tuple[Job, ...] = ()
        if isinstance(module, PackedLinear):
            jobs = (Job(shape=module.shape, packed=module.packed),)
        elif isinstance(module, FusedExperts):
            gate_up = Job(shape=module.gate_up_shape, packed=module.gate_up, activation=module.activation)
            jobs = (gate_up, Job(shape=module.down_shape, packed=module.down, weighted=True))
        if jobs:
            found.setdefault(tuple(job.shape.key for job in jobs), jobs)
    return list(found.values())


def token_counts(most: int) -> list[int]:
    """The buckets up to ``most`` tokens."""
    return [size for size in BUCKETS if size <= bucket(most)]


def tune(
    model: nn.Module,
    *,
    tokens: Iterable[int],
    device: torch.device,
    progress: Progress,
    measure: Measure | None = None,
    pick: Callable[[Shape, int, int], Iterator[Settings]] = candidates,
    known: Table | None = None,
) -> Tuned:
    """``measure``: seconds of a call; by default its median on the GPU, with a cold cache. ``pick``: what to try.
    ``known``: what need not be tuned again."""
    measure = measure or seconds_of
    processors = processors_of(device)
    started, tried, failed = time.monotonic(), 0, 0
    table: dict[str, dict[str, dict[str, Any]]] = {}
    groups, sizes = jobs_of(model), list(tokens)
    for done, jobs in enumerate(groups):
        wanted = [size for size in sizes if not _is_known(jobs, size, known or {})]
        if not wanted:
            continue
        names = " and ".join(job.shape.key for job in jobs)
        progress.note(f"tuning {names} ({done + 1} of {len(groups)})")
        for size in wanted:
            trials = []
            for job in jobs:
                first = default(job.shape, size, processors)
                others = [settings for settings in pick(job.shape, size, processors) if settings != first]
                trials.append(_race(_runner(job, size, device), first, others, device, measure))
                tried, failed = tried + len(others), failed + trials[-1].failed
            # There are always such: those of the default settings are the same for both.
            shared = set.intersection(*(set(trial.best) for trial in trials))
            rows = min(shared, key=lambda rows: sum(trial.best[rows][1] for trial in trials))
            for job, trial in zip(jobs, trials, strict=True):
                settings, seconds = trial.best[rows]
                table.setdefault(job.shape.key, {})[str(size)] = {
                    **settings.as_json(),
                    "microseconds": round(seconds * 1e6, 2),
                    "default_microseconds": round(trial.default_s * 1e6, 2),
                }
    return Tuned(table=table, tried=tried, failed=failed, seconds=time.monotonic() - started)


def _is_known(jobs: tuple[Job, ...], tokens: int, known: Table) -> bool:
    return all(tokens in known.get(job.shape.key, {}) for job in jobs)


@dataclass(kw_only=True)
class _Race:
    default_s: float
    best: dict[int, tuple[Settings, float]]
    """Rows of a block -> the fastest settings with them, and their seconds."""
    failed: int = 0


def _race(
    run: Runner, first: Settings, others: list[Settings], device: torch.device, measure: Measure
) -> _Race:
    """``first`` sets what is right, and runs in any case."""
    expected = run(first)(None)
    default_s = measure(lambda: run(first)(None), device)
    race = _Race(default_s=default_s, best={first.block_m: (first, default_s)})
    for settings in others:
        found_s = _try(run, settings, expected, device, measure)
        if found_s is None:
            race.failed += 1
        elif settings.block_m not in race.best or found_s < race.best[settings.block_m][1]:
            race.best[settings.block_m] = (settings, found_s)
    return race


def _try(
    run: Runner, settings: Settings, expected: torch.Tensor, device: torch.device, measure: Measure
) -> float | None:
    try:
        call = run(settings)
        # Not memory that may hold the right answer of the run before: what is left unwritten must not pass.
        found = call(torch.full_like(expected, torch.nan)).float()
        if not bool((found - expected.float()).abs().max() <= TOLERANCE * expected.float().abs().max()):
            return None
        return measure(lambda: call(None), device)
    except Exception as error:  # noqa: BLE001 - too much shared memory, or what this GPU's compiler cannot do
        _require_context(device, settings, error)
        return None


def _require_context(device: torch.device, settings: Settings, error: Exception) -> None:
    """ToolchainError TC-519 where a candidate has broken this process's context on the GPU: nothing after it counts."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as broken:
        raise ToolchainError(
            f"tuning broke off: {settings} failed with {type(error).__name__}: {error}",
            hint="load the engine with --kernels off, and report this",
            code="TC-519",
        ) from broken


def _runner(job: Job, tokens: int, device: torch.device) -> Runner:
    """With everything but the settings prepared."""
    from toolchain.kernels.launch import Rounded, multiply, round_inputs
    from toolchain.kernels.sorting import Route, make_route

    shape, packed = job.shape, job.packed
    generator = torch.Generator().manual_seed(tokens)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    routed = shape.experts > 1
    ids = None
    if routed:
        scores = torch.rand((tokens, shape.experts), generator=generator)
        ids = scores.topk(shape.top_k, dim=-1).indices.to(device)
    rows = tokens if not routed or shape.gated else tokens * shape.top_k
    values = torch.randn((rows, shape.k), generator=generator).to(device, dtype)
    weights = torch.rand(tokens * shape.top_k, generator=generator).to(device) if job.weighted else None
    x: torch.Tensor | Rounded = values
    div = shape.top_k if routed and shape.gated else 1
    if shape.kind.rounding != "none":
        per_pair = routed and shape.kind.rounding in ("tensor", "nvfp4")
        flat = ids.reshape(-1).to(torch.int32) if per_pair and ids is not None else None
        x = round_inputs(values, shape.kind, packed.input_scale, flat, div)
        div = 1 if per_pair else div
    routes: dict[int, Route] = {}

    def prepared(settings: Settings) -> Call:
        route = None
        if ids is not None:
            if settings.block_m not in routes:
                routes[settings.block_m] = make_route(ids, shape.experts, settings.block_m)
            route = routes[settings.block_m]
        return lambda out: multiply(
            packed,
            x,
            settings,
            out_dtype=dtype,
            route=route,
            x_div=div,
            activation=job.activation,
            weights=weights,
            out=out,
        )

    return prepared


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call on the GPU, its L2 cache cleared before each; on the CPU, of one call."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, warmup=5, rep=20, return_mode="median")
    return milliseconds / 1e3
