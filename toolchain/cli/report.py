"""toolchain report"""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import ENGINE, PATH, dry_run_option, force_option, json_option
from toolchain.cli.output import Terminal, emit, facts, size
from toolchain.core.errors import UsageError
from toolchain.core.files import refuse_file

PAGE = "index.html"


@click.command(name="report")
@click.argument("engines", metavar="ENGINE...", nargs=-1, required=True, type=ENGINE)
@click.option(
    "--output", type=PATH, help="Directory of index.html. Default: ENGINE/report; several engines need one."
)
@dry_run_option
@force_option
@json_option
def command(
    engines: tuple[Path, ...], output: Path | None, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Write one self-contained page about an engine, or about several engines side by side.

    \b
      toolchain report engines/mine
      toolchain report engines/a engines/b engines/c --output comparison

    The page reads what the stages wrote and says in a line what was not measured. It makes no network request. An
    older report is replaced; another file of that name only with --force.
    """
    from toolchain.report.comparison import write_comparison
    from toolchain.report.engine import write_report_to
    from toolchain.report.inputs import read_engine

    if len(engines) > 1 and output is None:
        raise UsageError(
            "several engines, and no place for their page", hint="give --output DIR", code="TC-803"
        )
    path = (output or engines[0] / "report") / PAGE
    if not _is_report(path):
        refuse_file(path, force=force)
    if dry_run:
        for engine in engines:
            read_engine(engine)
    elif len(engines) > 1:
        write_comparison(engines, path.parent)
    else:
        write_report_to(engines[0], path, Terminal())
    written = None if dry_run else path.stat().st_size
    said = {"report": str(path), "engines": [str(engine) for engine in engines], "bytes": written}
    shown = [
        ("report", path),
        ("engines", len(engines)),
        ("size", "not written" if dry_run else size(written or 0)),
    ]
    emit(said, as_json, facts(shown))


def _is_report(path: Path) -> bool:
    """Whether ``path`` is a page that this command wrote."""
    from toolchain.report.page import GENERATOR

    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return f'name="generator" content="{GENERATOR}'.encode() in handle.read(4096)
