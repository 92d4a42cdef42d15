"""toolchain demo"""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import PATH, dry_run_option, force_option, json_option, seed_option
from toolchain.cli.output import Terminal, emit, facts

DEFAULT_OUTPUT = Path("build/demo-moe")


@click.command(name="demo")
@click.option(
    "--output", type=PATH, default=DEFAULT_OUTPUT, show_default=True, help="Where the model is written."
)
@seed_option
@dry_run_option
@force_option
@json_option
def command(output: Path, seed: int, dry_run: bool, force: bool, as_json: bool) -> None:
    """Train the demo MoE: a small Qwen3-MoE, from scratch, on the source of Python's standard library.

    The result is a plain Hugging Face directory. A model that is there already is reused.
    """
    from toolchain.core.files import refuse_occupied
    from toolchain.demo.train import RECIPE, RECORD, make_demo

    if dry_run:
        present = (output / RECORD).is_file()
        refuse_occupied(output, force=force or present)
        value = {"model": str(output), "present": present, "seed": seed, "recipe": RECIPE, "dry_run": True}
        emit(value, as_json, facts(value.items()))
        return
    record = make_demo(output, seed=seed, force=force, progress=Terminal())
    ratio = record["unigram_perplexity"] / record["held_out_perplexity"]
    text = facts(
        [
            ("model", output),
            ("parameters", f"{record['parameters']:,}"),
            (
                "held-out perplexity",
                f"{record['held_out_perplexity']:.2f} on {record['held_out_tokens']} tokens",
            ),
            ("unigram perplexity", f"{record['unigram_perplexity']:.2f} (1/{ratio:.1f})"),
            ("trained in", f"{record['seconds']} s"),
        ]
    )
    emit({"model": str(output), **record}, as_json, text)
