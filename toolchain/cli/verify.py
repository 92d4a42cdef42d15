"""toolchain verify"""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import ENGINE, json_option
from toolchain.cli.output import Terminal, emit, facts, size


@click.command(name="verify")
@click.argument("directory", metavar="DIR", type=ENGINE)
@click.option(
    "--against", metavar="MODEL", help="Source model: what is not quantized must be bit-equal to it."
)
@json_option
@click.pass_context
def command(ctx: click.Context, directory: Path, against: str | None, as_json: bool) -> None:
    """Audit the written bytes of a quantized checkpoint (or of an engine's checkpoint).

    Exit status 1 with a list of every finding when a rule is broken.
    """
    from toolchain.checkpoint.audit import audit
    from toolchain.models.reader import resolve_model
    from toolchain.runtime.location import locate

    source = resolve_model(against) if against else None
    verdict = audit(locate(directory).checkpoint, against=source, progress=Terminal())
    lines = [str(finding) for finding in verdict.findings]
    counted = verdict.facts | {"bytes": size(verdict.facts["bytes"])}
    summary = facts([*counted.items(), ("verdict", "passed" if verdict.passed else "FAILED")])
    emit(verdict.to_json(), as_json, "\n".join([*lines, summary]))
    if not verdict.passed:
        ctx.exit(1)
