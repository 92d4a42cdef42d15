"""toolchain support"""

from __future__ import annotations

import click

from toolchain.cli.options import json_option
from toolchain.cli.output import emit, table
from toolchain.targets import support_table


@click.command(name="support")
@click.option("--gpu", help="Only this GPU.")
@click.option("--format", "format_name", help="Only this format.")
@click.option("--version", help="TensorRT-LLM release. Default: the latest stable one.")
@json_option
def command(gpu: str | None, format_name: str | None, version: str | None, as_json: bool) -> None:
    """Show which format runs on which GPU with which TensorRT-LLM, and on what evidence."""
    rows = [row.to_json() for row in support_table(gpu=gpu, format=format_name, version=version)]
    emit(
        rows,
        as_json,
        table(list(rows[0]), [list(row.values()) for row in rows]) if rows else "nothing matches",
    )
