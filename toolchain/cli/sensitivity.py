"""toolchain sensitivity"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import (
    PATH,
    calibration_options,
    device_option,
    force_option,
    format_option,
    json_option,
    policy_option,
    recipe_option,
    seed_option,
    trust_option,
)
from toolchain.cli.output import Terminal, emit, facts, table


@click.command(name="sensitivity")
@click.argument("model")
@format_option
@click.option(
    "--formats", help="More formats to measure, separated by commas. Each calibrates the model once more."
)
@click.option(
    "--data", type=PATH, help="Held-out text. Default: calibration text that calibration does not use."
)
@click.option("--eval-tokens", type=int, default=4096, show_default=True, help="Held-out tokens to judge on.")
@policy_option
@recipe_option
@calibration_options
@seed_option
@click.option(
    "--output",
    type=PATH,
    metavar="FILE",
    help="Write the JSON: sensitivity.json of an engine goes into its report.",
)
@force_option
@device_option
@trust_option
@json_option
def command(
    model: str,
    format_name: str | None,
    formats: str | None,
    data: Path | None,
    eval_tokens: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure KL(source || quantized) when only one layer group of MODEL is quantized, for every group.

    Groups are what runtimes need in one format: q/k/v, gate/up, all routed experts of a layer. Without --policy every
    linear layer of the decoder is measured. Nothing is written but --output.
    """
    from toolchain.core.files import atomic_write_json, refuse_file
    from toolchain.pipeline.sensitivity import measure_sensitivity

    if output is not None:
        refuse_file(output, force=force)
    names = [name.strip() for name in [*([format_name] if format_name else []), *(formats or "").split(",")]]
    found = measure_sensitivity(
        model,
        list(dict.fromkeys(filter(None, names))),
        data=data,
        eval_tokens=eval_tokens,
        options=options,
        progress=Terminal(),
    )
    if output is not None:
        atomic_write_json(output, found.to_json())
    emit(found.to_json(), as_json, _text(found) + (f"\n\nwritten to {output}" if output else ""))


def _text(found: Any) -> str:
    head = facts(
        [
            ("model", found.model),
            ("policy", found.policy),
            ("recipes", ", ".join(f"{name}: {recipe}" for name, recipe in found.recipes.items())),
            ("held out", f"{found.held_out['windows']} windows of {found.held_out['length_tokens']} tokens"),
            ("source bits", f"{found.source_bits:.2f} per parameter"),
        ]
    )
    rows = [
        (
            score.group,
            score.format,
            f"{score.parameters:,}",
            f"{score.kl:.3e}" + ("" if score.kl_stderr is None else f" ± {score.kl_stderr:.1e}"),
            f"{score.bits_saved:.3f}",
            "-" if score.kl_per_bit is None else f"{score.kl_per_bit:.3e}",
        )
        for score in found.scores
    ]
    return f"{head}\n\n" + table(
        ("layer.part", "format", "parameters", "KL (nats)", "bits saved", "KL per bit"), rows
    )
