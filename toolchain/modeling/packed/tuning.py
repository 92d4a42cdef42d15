"""Finds the settings of a packed model's multiplications by running them, on its own weights.

Every distinct shape is run with random inputs and random experts, for each number of tokens that may come up. A
candidate that does not compile, or whose result is not the default's, is left out and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolchain.core.progress import Progress
from toolchain.kernels.packing import Packed
from toolchain.kernels.settings import BUCKETS, Settings, Shape, bucket, candidates, default
from toolchain.modeling.packed.chooser import processors_of
from toolchain.modeling.packed.experts import FusedExperts
from toolchain.modeling.packed.linear import PackedLinear

TOLERANCE = 0.02
"""Largest difference of a candidate from the default settings, as a share of the largest output: BF16 sums."""
Measure = Callable[[Callable[[], Any], torch.device], float]


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


def jobs_of(model: nn.Module) -> list[Job]:
    """One for each distinct shape, in the order of the model."""
    found: dict[str, Job] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            found.setdefault(module.shape.key, Job(shape=module.shape, packed=module.packed))
        elif isinstance(module, FusedExperts):
            gate_up = Job(shape=module.gate_up_shape, packed=module.gate_up, activation=module.activation)
            found.setdefault(module.gate_up_shape.key, gate_up)
            down = Job(shape=module.down_shape, packed=module.down, weighted=True)
            found.setdefault(module.down_shape.key, down)
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
) -> Tuned:
    """``measure``: seconds of a call; by default its median on the GPU, with a cold cache. ``pick``: what to try."""
    measure = measure or seconds_of
    processors = processors_of(device)
    started, tried, failed = time.monotonic(), 0, 0
    table: dict[str, dict[str, dict[str, Any]]] = {}
    jobs, sizes = jobs_of(model), list(tokens)
    for done, job in enumerate(jobs):
        progress.note(f"tuning {job.shape.key} ({done + 1} of {len(jobs)})")
        for size in sizes:
            run = _runner(job, size, device)
            first = default(job.shape, size, processors)
            expected = run(first)().float()
            best, best_s = first, measure(run(first), device)
            base_s = best_s
            for settings in pick(job.shape, size, processors):
                if settings == first:
                    continue
                tried += 1
                found_s = _try(run, settings, expected, device, measure)
                if found_s is None:
                    failed += 1
                elif found_s < best_s:
                    best, best_s = settings, found_s
            table.setdefault(job.shape.key, {})[str(size)] = {
                **best.as_json(),
                "microseconds": round(best_s * 1e6, 2),
                "default_microseconds": round(base_s * 1e6, 2),
            }
    return Tuned(table=table, tried=tried, failed=failed, seconds=time.monotonic() - started)


def _try(
    run: Callable[[Settings], Callable[[], torch.Tensor]],
    settings: Settings,
    expected: torch.Tensor,
    device: torch.device,
    measure: Measure,
) -> float | None:
    try:
        call = run(settings)
        difference = (call().float() - expected).abs().max()
        if not bool(difference <= TOLERANCE * expected.abs().max()):
            return None
        return measure(call, device)
    except Exception:  # noqa: BLE001 - too much shared memory, or what this GPU's compiler cannot do: another is taken
        return None


def _runner(job: Job, tokens: int, device: torch.device) -> Callable[[Settings], Callable[[], torch.Tensor]]:
    """Settings -> a call of the multiplication with everything else prepared."""
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

    def prepared(settings: Settings) -> Callable[[], torch.Tensor]:
        route = None
        if ids is not None:
            if settings.block_m not in routes:
                routes[settings.block_m] = make_route(ids, shape.experts, settings.block_m)
            route = routes[settings.block_m]
        return lambda: multiply(
            packed,
            x,
            settings,
            out_dtype=dtype,
            route=route,
            x_div=div,
            activation=job.activation,
            weights=weights,
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
