"""toolchain plan"""

from __future__ import annotations

from typing import Any

import click

from toolchain.cli.options import (
    auto_options,
    calibration_options,
    format_of_spec,
    json_option,
    kv_cache_option,
    policy_option,
    recipe_option,
    seed_option,
    sparsity_options,
    trust_option,
)
from toolchain.cli.output import emit
from toolchain.cli.placement import placement_options
from toolchain.cli.plan_text import render_plan
from toolchain.cli.spec import request_of
from toolchain.core.findings import errors


@click.command(name="plan")
@click.argument("model", metavar="MODEL|SPEC")
@format_of_spec
@auto_options
@policy_option
@recipe_option
@sparsity_options
@kv_cache_option
@placement_options
@calibration_options
@seed_option
@trust_option
@json_option
@click.pass_context
def command(ctx: click.Context, model: str, format_name: str | None, as_json: bool, **options: Any) -> None:
    """Say what would be done to MODEL, what it takes, and every problem at once. Reads headers, no weights.

    A YAML spec, such as those in engines/, may stand for MODEL; options given here win over it. Exit status 2 when the
    plan cannot be carried out.
    """
    from toolchain.pipeline.planning import make_request_plan

    plan = make_request_plan(request_of(ctx, model, format_name, options))
    emit(plan.to_json(), as_json, render_plan(plan))
    if errors(plan.findings):
        ctx.exit(2)
