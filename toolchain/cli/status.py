"""toolchain status"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import click

from toolchain.cli.options import json_option
from toolchain.cli.output import emit, table


@click.command(name="status")
@click.argument("address", metavar="[HOST:PORT|URL]", required=False)
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="How long a model may take for one token.",
)
@json_option
def command(address: str | None, timeout_s: float, as_json: bool) -> int:
    """Show the servers that `toolchain serve` runs on this machine, and ask every model for one token now.

    With an address: any Triton (gRPC or HTTP port) or OpenAI-compatible endpoint; its API key is taken from
    OPENAI_API_KEY. Exit status: 0 all healthy (or nothing runs), 1 something is not.
    """
    if address is not None:
        return _foreign(address, timeout_s, as_json)
    from toolchain.serve.status import servers_status

    servers = servers_status(probe_timeout_s=timeout_s)
    value = [{**asdict(server), "healthy": server.healthy} for server in servers]
    text = (
        "\n\n".join(_describe(server) for server in servers)
        or "`toolchain serve` runs nothing on this machine"
    )
    emit(value, as_json, text)
    return 0 if all(server.healthy for server in servers) else 1


def _describe(server: Any) -> str:
    state = server.state
    said = "healthy" if server.healthy else "draining" if server.draining else "NOT healthy"
    lines = [
        f"pid {state.pid}: {said}, up {_duration(server.uptime_s)}"
        + (f"; {server.problem}" if server.problem else ""),
        f"  http     {state.http}",
        f"  grpc     {state.grpc}",
        f"  metrics  {state.metrics}",
        f"  status   {state.status}/health/ready",
        *([f"  openai   {state.openai}/v1"] if state.openai else []),
        f"  repository {state.repository}, log {state.log}",
    ]
    rows = [
        (
            model.name,
            ", ".join(map(str, model.versions)) or "none",
            model.engine or "?",
            model.manifest_sha256[:12],
            "-" if model.probe_ms is None else f"{model.probe_ms:g}",
            _ago(model.last_probe),
            model.recoveries,
            model.running,
            model.waiting,
            f"{model.tokens_per_second:g}",
            model.problem or "healthy",
        )
        for model in server.models
    ]
    headers = ("model", "versions", "engine", "manifest", "token ms", "last seen", "recovered", "running")
    if rows:
        lines.append(table((*headers, "waiting", "tokens/s", "state"), rows))
    return "\n".join(lines)


def _foreign(address: str, timeout_s: float, as_json: bool) -> int:
    from toolchain.serve.foreign import foreign_status

    status = foreign_status(address, timeout_s=timeout_s)
    rows = [
        (model.name, model.version or "-", "healthy" if model.healthy else "NOT healthy", model.note)
        for model in status.models
    ]
    text = f"{status.url} ({status.kind})\n" + table(("model", "version", "state", "note"), rows)
    emit({**asdict(status), "healthy": status.healthy}, as_json, text)
    return 0 if status.healthy else 1


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _ago(moment: float) -> str:
    return f"{max(0.0, time.time() - moment):.1f} s ago" if moment else "never"
