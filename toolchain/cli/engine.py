"""toolchain engine"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import (
    PATH,
    auto_options,
    calibration_options,
    device_option,
    dry_run_option,
    executor_options,
    force_option,
    format_of_spec,
    gate_options,
    json_option,
    kv_cache_option,
    policy_option,
    recipe_option,
    seed_option,
    sparsity_options,
    stream_option,
    trust_option,
)
from toolchain.cli.output import Terminal, emit, facts, size
from toolchain.cli.placement import placement_options
from toolchain.cli.plan_text import render_coverage, render_plan
from toolchain.cli.spec import request_of
from toolchain.cli.training import training_rows
from toolchain.core.findings import errors


@click.command(name="engine")
@click.argument("model", metavar="MODEL|SPEC")
@format_of_spec
@auto_options
@policy_option
@recipe_option
@sparsity_options
@kv_cache_option
@placement_options
@calibration_options
@stream_option
@executor_options
@click.option("--eval-data", help="Held-out text. Default: evaluation.jsonl of MODEL, if it has one.")
@click.option("--eval-tokens", type=int, default=16_384, show_default=True, help="Tokens to judge on.")
@gate_options
@click.option("--output", type=PATH, help="Engine directory. Default: engines/<name>.")
@click.option("--triton-output", type=PATH, help="Triton repository. Default: triton_repo/<name>.")
@seed_option
@device_option
@trust_option
@dry_run_option
@force_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    format_name: str | None,
    output: Path | None,
    triton_output: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan, quantize, verify, evaluate, build and render: MODEL to a served engine, in one command.

    A YAML spec with the same option names may stand for MODEL; options given here win over it. Finished stages whose
    inputs and outputs still match their hashes are skipped. An engine that fails a gate is kept, but marked as not
    fit to serve, without a Triton repository; exit status 1.
    """
    from toolchain.pipeline.engine import make_engine
    from toolchain.pipeline.planning import make_request_plan

    request = request_of(ctx, model, format_name, options)
    directory = output or Path("engines") / request.engine_name()
    repository = triton_output or Path("triton_repo") / directory.name
    if dry_run:
        plan = make_request_plan(request)
        emit(plan.to_json(), as_json, f"{render_plan(plan)}\n\nwould write {directory} and {repository}")
        if errors(plan.findings):
            ctx.exit(2)
        return
    result = make_engine(
        request, directory, repository, command=["toolchain", *sys.argv[1:]], force=force, progress=Terminal()
    )
    emit(result.manifest, as_json, summary(result))


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
    if result.manifest["target"] == "local":
        return f"toolchain generate {result.directory} --prompt 'def '  |  toolchain serve {result.directory}"
    return (
        f"trtllm-serve {result.directory}/checkpoint --extra_llm_api_options {result.directory}/llm_args.yaml  |  "
        f"more in {result.directory}/commands.md"
    )
