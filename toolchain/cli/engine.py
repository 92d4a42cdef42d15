"""toolchain engine"""

from __future__ import annotations

from typing import Any

import click

from toolchain.cli.making import Making, judging_options, make, making_options, numbers_options
from toolchain.cli.options import executor_options, format_of_spec, stream_option
from toolchain.cli.spec import request_of


@click.command(name="engine")
@click.argument("model", metavar="MODEL|SPEC")
@format_of_spec
@numbers_options
@stream_option
@executor_options
@judging_options
@making_options("<name>")
@click.pass_context
def command(ctx: click.Context, model: str, format_name: str | None, **options: Any) -> None:
    """Plan, quantize, verify, evaluate, build and render: MODEL to a served engine, in one command.

    A YAML spec with the same option names may stand for MODEL; options given here win over it. Finished stages whose
    inputs and outputs still match their hashes are skipped. An engine that fails a gate is kept, but marked as not
    fit to serve, without a Triton repository; exit status 1.
    """
    making = Making.taken_from(options)
    request = request_of(ctx, model, format_name, options)
    make(ctx, request, request.engine_name(), making)
