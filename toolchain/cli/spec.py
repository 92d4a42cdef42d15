"""MODEL or SPEC: what the user typed first, as a request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from toolchain.core.errors import UsageError

if TYPE_CHECKING:
    from toolchain.pipeline.request import EngineRequest


def request_of(
    ctx: click.Context, model: str, format_name: str | None, options: dict[str, Any]
) -> EngineRequest:
    """A YAML spec with the options that were typed over it, or ``model`` with all options.

    UsageError TC-007 for a spec that does not exist or cannot be read.
    """
    from toolchain.pipeline.request import EngineRequest, read_spec

    if not model.endswith((".yaml", ".yml")):
        return EngineRequest(model=model, format=format_name, **options)
    given = {
        key: value
        for key, value in options.items()
        if ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE
    }
    if format_name:
        given["format"] = format_name
    path = Path(model)
    if not path.is_file():
        raise UsageError(
            f"spec {path} does not exist", hint="`ls engines/*.yaml` shows those that ship", code="TC-007"
        )
    return read_spec(path, given)
