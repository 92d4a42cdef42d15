"""What the commands share that make an engine in one go: their options, the dry run, and what was made."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import (
    PATH,
    Decorator,
    auto_options,
    calibration_options,
    device_option,
    dry_run_option,
    force_option,
    gate_options,
    json_option,
    kv_cache_option,
    policy_option,
    recipe_option,
    seed_option,
    sparsity_options,
    stack,
    trust_option,
)
from toolchain.cli.output import Terminal, emit, facts, size
from toolchain.cli.placement import placement_options
from toolchain.cli.plan_text import render_coverage, render_plan
from toolchain.cli.training import training_rows
from toolchain.core.findings import errors

numbers_options = stack(
    auto_options,
    policy_option,
    recipe_option,
    sparsity_options,
    kv_cache_option,
    placement_options,
    calibration_options,
)
judging_options = stack(
    click.option("--eval-data", help="Held-out text. Default: evaluation.jsonl of MODEL, if it has one."),
    click.option("--eval-tokens", type=int, default=16_384, show_default=True, help="Tokens to judge on."),
    gate_options,
)


def making_options(name: str) -> Decorator:
    """Where and how; ``name``: of the default engine directory, for the help text."""
    return stack(
        click.option("--output", type=PATH, help=f"Engine directory. Default: engines/{name}."),
        click.option("--triton-output", type=PATH, help="Triton repository. Default: triton_repo/<name>."),
        seed_option,
        device_option,
        trust_option,
        dry_run_option,
        force_option,
        json_option,
    )


@dataclass(frozen=True, kw_only=True)
class Making:
    """What ``making_options`` say and no request holds."""

    output: Path | None
    triton_output: Path | None
    dry_run: bool
    force: bool
    as_json: bool

    @staticmethod
    def taken_from(options: dict[str, Any]) -> Making:
        """Takes them out of ``options``."""
        return Making(**{item.name: options.pop(item.name) for item in fields(Making)})


def make(ctx: click.Context, request: Any, name: str, making: Making) -> None:
    """Make the engine of ``request`` (``EngineRequest``), called ``name`` unless ``making`` says where; or only plan
    it, with exit status 2 where the plan has errors."""
    directory = making.output or Path("engines") / name
    repository = making.triton_output or Path("triton_repo") / directory.name
    if making.dry_run:
        from toolchain.pipeline.planning import make_request_plan

        plan = make_request_plan(request)
        emit(
            plan.to_json(), making.as_json, f"{render_plan(plan)}\n\nwould write {directory} and {repository}"
        )
        if errors(plan.findings):
            ctx.exit(2)
        return
    from toolchain.pipeline.engine import make_engine

    result = make_engine(
        request,
        directory,
        repository,
        command=["toolchain", *sys.argv[1:]],
        force=making.force,
        progress=Terminal(),
    )
    emit(result.manifest, making.as_json, summary(result))


def summary(result: Any) -> str:
    """What was made, for people."""
    manifest, figures = result.manifest, result.plan.estimates
    metrics, stages = manifest["metrics"], manifest["stages"]
    rows: list[tuple[str, Any]] = [
        ("engine", result.directory),
        ("format", f"{manifest['format']}, policy {manifest['policy']}, KV cache {manifest['kv_cache']}"),
        ("target", f"{manifest['target']} {manifest['target_version']} on {manifest['gpu']}"),
        ("size", f"{size(figures.source_bytes)} -> {size(figures.checkpoint_bytes)}"),
        ("effective bits", f"{figures.effective_bits:.2f}"),
        *([("auto", _auto(result.plan.auto))] if result.plan.auto else []),
        *training_rows(manifest),
    ]
    if metrics.get("measured"):
        rows += [
            (
                "perplexity",
                f"{metrics['baseline_ppl']:.3f} -> {metrics['ppl']:.3f} ({metrics['tokens']} held-out tokens)",
            ),
            (
                "KL to source",
                f"{metrics['kl_mean']:.5f} mean, {metrics['kl_p99']:.4f} p99; "
                f"top-1 agreement {metrics['top1_agreement']:.1%}{_routers(metrics)}",
            ),
        ]
    else:
        rows.append(("perplexity", "not measured: no held-out text (--eval-data)"))
    rows += [
        ("expert coverage", render_coverage(stages["quantize"]["facts"])),
        ("verified", f"yes, {stages['verify']['facts']['tensors']} tensors"),
        ("report", result.directory / "report" / "index.html"),
        ("triton repository", result.repository),
        ("next", _next(result)),
    ]
    return facts(rows)


def _routers(metrics: dict[str, Any]) -> str:
    agreement = metrics.get("router_agreement")
    return "" if agreement is None else f"; router agreement {agreement:.1%}"


def _auto(found: dict[str, Any]) -> str:
    return f"at most {found['bits']:g} bits: {found['verdict']['kept']} kept, {found['verdict']['reason']}"


def _next(result: Any) -> str:
    place, target = result.directory, result.manifest["target"]
    if target == "local":
        return f"toolchain generate {place} --prompt 'def '  |  toolchain serve {place}"
    if target == "tensorrt":
        from toolchain.build.tensorrt import bundle, command

        deploy = f"toolchain deploy {place} --runtime triton --image IMAGE"
        if (place / command.ENGINE).is_dir():
            return deploy
        return f"container_command of {place / bundle.RECORD} builds the engine  |  {deploy}"
    return (
        f"trtllm-serve {place}/checkpoint --extra_llm_api_options {place}/llm_args.yaml  |  "
        f"more in {place}/commands.md"
    )
