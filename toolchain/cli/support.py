"""toolchain support"""

from __future__ import annotations

import click

from toolchain.cli.options import json_option
from toolchain.cli.output import emit, table
from toolchain.targets import SupportRow, support_table

COLUMNS = ("target", "version", "gpu", "sm", "format", "model", "state", "backend", "others", "note")


@click.command(name="support")
@click.option("--gpu", help="Only this GPU.")
@click.option("--format", "format_name", help="Only this format.")
@click.option("--version", help="TensorRT-LLM release. Default: the latest stable one.")
@json_option
def command(gpu: str | None, format_name: str | None, version: str | None, as_json: bool) -> None:
    """Show which format runs on which GPU with which TensorRT-LLM, and on what evidence.

    For mixtures of experts, `backend` is the value of moe_config.backend that is chosen, and `others` are those that
    run it too (those in parentheses with limits). Below the table: what is reported to fail. --json adds every backend
    with its reason, and the source of each row.
    """
    rows = support_table(gpu=gpu, format=format_name, version=version)
    emit([row.to_json() for row in rows], as_json, _text(rows) if rows else "nothing matches")


def _text(rows: list[SupportRow]) -> str:
    cells = [
        (
            row.target,
            row.version,
            row.gpu,
            row.sm,
            row.format,
            row.model,
            row.state,
            row.backend,
            _others(row),
            row.note,
        )
        for row in rows
    ]
    return "\n".join([table(COLUMNS, cells), *_reports(rows)])


def _others(row: SupportRow) -> str:
    names = [
        item.name if item.state == "yes" else f"({item.name})"
        for item in row.backends
        if item.state != "no" and item.name != row.backend
    ]
    return " ".join(names)


def _reports(rows: list[SupportRow]) -> list[str]:
    """One line for each report, with the link; the same report stands once."""
    found = dict.fromkeys(item for row in rows for item in row.known_bad)
    lines = []
    for item in found:
        where = ", ".join((*item.families, *item.formats)) or "any model"
        lines.append(f"  {where}: {item.what}; use {item.instead}\n    {item.link}")
    return ["", "Reported to fail:", *lines] if lines else []
