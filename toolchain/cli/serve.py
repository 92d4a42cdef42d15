"""toolchain serve"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import ENGINE, PATH, allow_unfit_option, dry_run_option, json_option
from toolchain.cli.output import Terminal, emit, write_data


@click.command(name="serve")
@click.argument("engine", type=ENGINE)
@click.option(
    "--repository", type=PATH, help="Model repository. Default: triton_repo/<engine>, rendered if absent."
)
@click.option("--http-port", type=int, default=8000, show_default=True, help="0 chooses a free one.")
@click.option("--grpc-port", type=int, default=8001, show_default=True, help="0 chooses a free one.")
@click.option("--metrics-port", type=int, default=8002, show_default=True, help="0 chooses a free one.")
@click.option("--address", default="127.0.0.1", show_default=True, help="0.0.0.0 exposes it to the network.")
@allow_unfit_option
@dry_run_option
@click.option("--force", is_flag=True, help="Render the repository again, although it is there.")
@json_option
def command(
    engine: Path,
    repository: Path | None,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    address: str,
    allow_unfit: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Serve ENGINE with a real tritonserver in the foreground, until Ctrl-C or SIGTERM.

    It is reported ready only once it has answered a real inference.
    """
    from toolchain.evaluate.gates import require_fit
    from toolchain.triton.engine_dir import read_engine_dir
    from toolchain.triton.render import render_repository
    from toolchain.triton.serve import Ports, serve_engine

    found = read_engine_dir(engine)
    require_fit(engine, found.manifest, allow_unfit=allow_unfit)
    target = repository or Path("triton_repo") / found.name
    if dry_run:
        from toolchain.triton.install import require_server

        value = {"engine": str(engine), "repository": str(target), "server": require_server().description}
        emit(value, as_json, f"would serve {target} with {value['server']}")
        return
    if force or not target.is_dir():
        render_repository(engine, target, force=force, allow_unfit=allow_unfit)

    def ready(server: Any) -> None:
        value = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}
        text = (
            f"serving {found.name}\n  http     {server.http_url}\n  grpc     {server.grpc_url}\n"
            f"  metrics  {server.metrics_url}\n"
            f"  try      curl -s {server.http_url}/v2/models/tensorrt_llm/generate_stream -d "
            """'{"text_input": "def ", "streaming": true, "sampling_param_max_tokens": 32}'\n"""
            f"  measure  toolchain bench {server.grpc_url} --tokenizer {engine}"
        )
        write_data(json.dumps(value) if as_json else text)

    ports = Ports(http=http_port, grpc=grpc_port, metrics=metrics_port)
    serve_engine(engine, target, ports, ready, address=address, progress=Terminal())
