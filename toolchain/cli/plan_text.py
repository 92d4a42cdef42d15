"""A Plan for people."""

from __future__ import annotations

from typing import Any

from toolchain.cli.output import GIB, facts, size, table
from toolchain.cli.training import render_training
from toolchain.plan.types import Assignment, Plan


def render_plan(plan: Plan) -> str:
    figures = plan.estimates
    head = facts(
        [
            ("model", f"{plan.model} ({plan.architecture}, family {plan.family})"),
            ("format", f"{plan.format}, recipe {plan.recipe}, KV cache {plan.kv_cache}"),
            ("policy", _policy(plan)),
            *(
                [
                    (
                        "sparsity",
                        f"{plan.sparsity.pattern} by {plan.sparsity.method}, of every quantized matrix",
                    )
                ]
                if plan.sparsity
                else []
            ),
            ("target", f"{plan.target} {plan.target_version} on {plan.gpu}".strip()),
            ("serving", _serving(plan)),
            ("parameters", f"{figures.parameters:,} ({figures.active_parameters:,} per token)"),
            ("checkpoint", f"{size(figures.source_bytes)} -> {size(figures.checkpoint_bytes)}"),
            ("effective bits", f"{figures.effective_bits:.2f} per parameter{_budget(plan)}"),
            ("per GPU", _per_gpu(plan)),
            ("to quantize", f"{size(figures.quantize_memory_bytes)}, about {figures.quantize_seconds:.0f} s"),
            ("or streamed", _streamed(plan)),
            ("basis", figures.basis),
        ]
    )
    parts = table(
        ("part", "layers", "format", "matrices", "parameters", "bytes", "why", "decided by"),
        _rows(plan.assignments),
    )
    findings = "\n".join(str(finding) for finding in plan.findings)
    return "\n\n".join(text for text in (head, parts, render_training(plan), findings) if text)


def _policy(plan: Plan) -> str:
    said = [f"{name.replace('_', '-')} {value}" for name, value in plan.policy_options.said.items()]
    formats = "no format" if not plan.formats else ", ".join(plan.formats)
    return f"{', '.join([plan.policy, *said])}: {formats} and the source dtype"


def _serving(plan: Plan) -> str:
    wanted = plan.serving
    text = f"{wanted.max_batch_size} requests of {wanted.max_seq_len} tokens"
    if wanted.tp * wanted.pp == 1:
        return text
    parallel = [f"{name} {getattr(wanted, name)}" for name in ("tp", "ep", "pp") if getattr(wanted, name) > 1]
    if wanted.attention_dp:
        text += " on each rank"
        parallel.append("attention data parallelism")
    if wanted.eplb_slots:
        parallel.append(f"{wanted.eplb_slots} expert slots")
    return f"{text}; {wanted.tp * wanted.pp} GPUs: {', '.join(parallel)}"


def _budget(plan: Plan) -> str:
    """What a search for mixed precision was asked for, and what came of it."""
    if plan.auto is None:
        return ""
    verdict = plan.auto["verdict"]
    return f" (auto, at most {plan.auto['bits']:g}{': ' + verdict['kept'] + ' kept' if verdict else ''})"


def _streamed(plan: Plan) -> str:
    figures = plan.estimates
    if not figures.stream_way:
        return "not possible: SparseGPT looks at the model in memory"
    way = "layer by layer" if figures.stream_way == "layers" else "shard by shard, without data"
    disk = f", {size(figures.stream_disk_bytes)} of disk for inputs" if figures.stream_disk_bytes else ""
    return f"{size(figures.stream_memory_bytes)}{disk} (--stream, {way}; the same bytes)"


def _per_gpu(plan: Plan) -> str:
    figures = plan.estimates
    used = figures.weights_per_gpu_bytes + figures.kv_cache_per_gpu_bytes + figures.activations_per_gpu_bytes
    have = f" of {figures.gpu_memory_bytes / GIB:.1f} GiB" if figures.gpu_memory_bytes else ""
    return (
        f"{size(used)}{have}: weights {size(figures.weights_per_gpu_bytes)}, KV cache "
        f"{size(figures.kv_cache_per_gpu_bytes)}, activations {size(figures.activations_per_gpu_bytes)}"
    )


def _rows(assignments: tuple[Assignment, ...]) -> list[tuple[str, ...]]:
    """One row for all layers of a part that are treated alike, for one reason."""
    alike: dict[tuple[str, ...], list[Assignment]] = {}
    for item in assignments:
        part = item.role + (f" ({', '.join(item.projections)})" if item.projections else "")
        alike.setdefault((part, item.format, item.reason, item.source), []).append(item)
    rows: list[tuple[str, ...]] = []
    for (part, name, reason, source), items in alike.items():
        rows.append(
            (
                part,
                _layers([item.layer for item in items if item.layer is not None]),
                name,
                f"{sum(item.modules for item in items):,}",
                f"{sum(item.parameters for item in items):,}",
                size(sum(item.planned_bytes for item in items)),
                reason,
                source,
            )
        )
    return rows


def _layers(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> ``0-2,5``; empty -> ``-``."""
    if not numbers:
        return "-"
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def render_coverage(made: dict[str, Any]) -> str:
    """What the manifest (or the facts of the quantize stage) says of the experts' calibration, in one line."""
    found = made.get("coverage")
    if not found:
        return "not measured"
    text = f"{found['min']} to {found['max']} tokens per expert and layer ({found['mode']})"
    return f"{text}; {found['starved']} starved: {made['starved_remedy']}" if found["starved"] else text
