"""toolchain explain CODE"""

from __future__ import annotations

import click

from toolchain.cli.options import json_option
from toolchain.cli.output import emit
from toolchain.core.codes import CODES
from toolchain.core.errors import UsageError


@click.command(name="explain")
@click.argument("code")
@json_option
def command(code: str, as_json: bool) -> None:
    """Explain an error or finding CODE, such as TC-316."""
    found = CODES.get(code.upper())
    if found is None:
        raise UsageError(f"no code {code!r}; codes run from {min(CODES)} to {max(CODES)}", code="TC-009")
    title, text = found
    emit({"code": code.upper(), "title": title, "text": text}, as_json, f"{code.upper()}: {title}\n\n{text}")
