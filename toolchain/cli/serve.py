"""toolchain serve"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import ENGINE, PATH, allow_unfit_option, dry_run_option, json_option
from toolchain.cli.output import Terminal, emit, write_data
from toolchain.cli.serve_options import (
    default_repository,
    drain_options,
    engines_options,
    openai_options,
    port_options,
    refuse_ignored,
    rendering,
)

EPILOG = """\b
Exit status:
  0  stopped by a signal (or before it served); every stream that ran has ended
  1  failed: the server did not start
  2  wrong usage: a bad engine, a port in use
  3  stopped by a signal; streams still ran after --drain-timeout-s and were cut
  4  a model died or hung, or tritonserver ended, and could not be brought back
  130, 143  a second SIGINT, SIGTERM: ended at once
"""


@click.command(name="serve", epilog=EPILOG)
@click.argument("engines", metavar="ENGINE...", type=ENGINE, nargs=-1, required=True)
@click.option(
    "--repository",
    type=PATH,
    help="Model repository. Default: triton_repo/<engine>, of several engines triton_repo/<engine>+<engine>...; "
    "rendered if absent.",
)
@port_options
@engines_options
@openai_options
@drain_options
@allow_unfit_option
@dry_run_option
@click.option("--force", is_flag=True, help="Render the repository again, although it is there.")
@json_option
def command(
    engines: tuple[Path, ...],
    repository: Path | None,
    allow_unfit: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Serve ENGINEs with a real tritonserver in the foreground, until Ctrl-C or SIGTERM.

    It is reported ready only once every model has answered a real inference. From then on models are probed; one whose
    stub has died or whose engine hangs is unloaded and loaded again. One engine is the model tensorrt_llm, several are
    models with the names of their engines.
    """
    from toolchain.evaluate.gates import require_fit
    from toolchain.serve.run import serve_engine
    from toolchain.serve.signals import Interrupted
    from toolchain.triton.engine_dir import read_engine_dir
    from toolchain.triton.install import require_server
    from toolchain.triton.render import name_models, render_repository

    found = [read_engine_dir(path) for path in engines]
    for engine in found:
        require_fit(engine.path, engine.manifest, allow_unfit=allow_unfit)
    models = name_models(found, given["model_name"])
    target = repository or default_repository(found)
    frontend = _frontend(models, given)
    if dry_run:
        value = {
            "engines": [str(path) for path in engines],
            "models": list(models),
            "repository": str(target),
            "server": require_server().description,
        }
        emit(value, as_json, f"would serve {', '.join(models)} from {target} with {value['server']}")
        return 0
    if target.is_dir() and not force:
        refuse_ignored(target)
    else:
        render_repository(engines, target, force=force, allow_unfit=allow_unfit, **rendering(given))
    try:
        return serve_engine(
            engines,
            target,
            _ports(given),
            lambda serving: _say(serving, list(models), engines[0], as_json),
            options=_options(given),
            model_name=given["model_name"],
            frontend=frontend,
            progress=Terminal(),
        )
    except Interrupted as signal:
        click.echo(f"{signal}: ended at once", err=True)
        return 128 + signal.number


def _ports(given: dict[str, Any]) -> Any:
    from toolchain.serve.run import Ports

    names = ("http", "grpc", "metrics", "status")
    return Ports(**{name: given[f"{name}_port"] for name in names})


def _options(given: dict[str, Any]) -> Any:
    from toolchain.serve.run import ServeOptions
    from toolchain.serve.supervise import SupervisionSettings

    return ServeOptions(
        address=given["address"],
        drain_timeout_s=given["drain_timeout_s"],
        supervision=SupervisionSettings(
            probe_interval_s=given["probe_interval_s"],
            hang_timeout_s=given["hang_timeout_s"],
            max_recoveries=given["max_recoveries"],
        ),
    )


def _frontend(models: dict[str, Any], given: dict[str, Any]) -> Any:
    """What starts the OpenAI endpoint once the server answers; None without --openai. UsageError for a bad key file or
    an engine that it cannot serve, before anything starts."""
    if not given["openai"]:
        return None
    from toolchain.openai.keys import read_api_keys, refuse_exposed
    from toolchain.openai.server import OpenAiServer
    from toolchain.openai.settings import ServedModel

    keys = read_api_keys(given["api_key_file"]) if given["api_key_file"] else ()
    refuse_exposed(given["openai_address"], keys, without_key=False)
    served = {
        name: ServedModel.of_engine(engine, chat_template=given["chat_template"])
        for name, engine in models.items()
    }

    def start(server: Any) -> OpenAiServer:
        return OpenAiServer(
            grpc_url=server.grpc_url,
            models=served,
            host=given["openai_address"],
            port=given["openai_port"],
            api_keys=keys,
        ).start()

    return start


def _say(serving: Any, models: list[str], engine: Path, as_json: bool) -> None:
    server = serving.server
    value = {
        "models": models,
        "http": server.http_url,
        "grpc": server.grpc_url,
        "metrics": server.metrics_url,
        "status": serving.status_url,
    }
    openai = f"  openai   {serving.openai_url}/v1\n" if serving.openai_url else ""
    if serving.openai_url:
        value["openai"] = f"{serving.openai_url}/v1"
    text = (
        f"serving {', '.join(models)}\n  http     {server.http_url}\n  grpc     {server.grpc_url}\n"
        f"  metrics  {server.metrics_url}\n  status   {serving.status_url}/health/ready\n{openai}"
        f"  try      curl -s {server.http_url}/v2/models/{models[0]}/generate_stream -d "
        """'{"text_input": "def ", "streaming": true, "sampling_param_max_tokens": 32}'\n"""
        f"  measure  toolchain bench {server.grpc_url} --tokenizer {engine}"
    )
    write_data(json.dumps(value) if as_json else text)
