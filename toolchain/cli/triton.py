"""toolchain triton ENGINE (render), toolchain triton update, toolchain triton lint DIR, toolchain triton install"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import ENGINE, PATH, allow_unfit_option, dry_run_option, force_option, json_option
from toolchain.cli.output import Terminal, emit
from toolchain.cli.serve_options import default_repository, engines_options, rendering
from toolchain.core.findings import errors


class RenderByDefault(click.Group):
    """``toolchain triton ENGINE`` is short for ``toolchain triton render ENGINE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["render", *args]
        return super().parse_args(ctx, args)


@click.group(name="triton", cls=RenderByDefault)
def command() -> None:
    """Render the Triton model repository of an ENGINE, or lint any repository.

    \b
    toolchain triton ENGINE [--output DIR]    render (the same as `triton render ENGINE`)
    toolchain triton update ENGINE --repository DIR   another engine takes over on a running server
    toolchain triton lint DIR [--load]        check a repository, with --load on a real server
    toolchain triton install                  install a real tritonserver for this machine
    """


@command.command(name="render")
@click.argument("engines", metavar="ENGINE...", type=ENGINE, nargs=-1, required=True)
@click.option("--output", type=PATH, help="Repository directory. Default: triton_repo/<engine>.")
@click.option(
    "--served-engine-dir", type=PATH, help="Where the server sees ENGINE, if elsewhere (a container's mount)."
)
@engines_options
@allow_unfit_option
@dry_run_option
@force_option
@json_option
def render(
    engines: tuple[Path, ...],
    output: Path | None,
    served_engine_dir: Path | None,
    allow_unfit: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Render the Triton model repository of ENGINE, or of several.

    One engine is the model tensorrt_llm, several are models with the names of their engines.
    """
    from toolchain.evaluate.gates import require_fit
    from toolchain.triton.engine_dir import read_engine_dir
    from toolchain.triton.render import name_models, render_repository

    found = [read_engine_dir(engine) for engine in engines]
    for each in found:
        require_fit(each.path, each.manifest, allow_unfit=allow_unfit)
    models = name_models(found, given["model_name"])
    target = output or default_repository(found)
    if not dry_run:
        render_repository(
            engines,
            target,
            force=force,
            served_engine_dir=served_engine_dir,
            allow_unfit=allow_unfit,
            **rendering(given),
        )
    value = {
        "engine": str(engines[0]),
        "target": found[0].target,
        "repository": str(target),
        "dry_run": dry_run,
        "models": {name: str(engine.path) for name, engine in models.items()},
    }
    targets = ", ".join(sorted({engine.target for engine in found}))
    emit(value, as_json, f"{'would render' if dry_run else 'rendered'} {target} (target {targets})")


@command.command(name="update")
@click.argument("engine", type=ENGINE)
@click.option("--repository", type=PATH, required=True, help="The model repository that is served.")
@click.option(
    "--server",
    metavar="HOST:GRPC_PORT",
    help="gRPC endpoint of the server. Default: the one that `toolchain serve` runs on the repository.",
)
@click.option("--model-name", help="Which model. Default: the only one, else the one with the engine's name.")
@click.option("--warmup-requests", type=click.IntRange(min=1), help="Default: as the version before.")
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=1),
    default=1800.0,
    show_default=True,
    help="For loading, and again for unloading.",
)
@allow_unfit_option
@dry_run_option
@json_option
def update(
    engine: Path, repository: Path, as_json: bool, dry_run: bool, server: str | None, **given: Any
) -> None:
    """Put ENGINE in a served model's place while it is served: no request is lost.

    The new version is loaded beside the old one, so that both are in memory for a moment. When it does not load or does
    not answer, the old one goes on serving.
    """
    from toolchain.serve.update import check_update, update_model

    if dry_run:
        names = {key: given[key] for key in ("model_name", "allow_unfit")}
        found, model_dir, url, _ = check_update(engine, repository, grpc_url=server, **names)
        value = {"model": model_dir.name, "engine": found.name, "server": url, "dry_run": True}
        emit(value, as_json, f"would load {found.name} as the newest version of {model_dir.name} on {url}")
        return
    done = update_model(engine, repository, grpc_url=server, progress=Terminal(), **given)
    text = f"{done.model}: version {done.version} is {done.engine}, ready after {done.load_seconds:.1f} s"
    if done.replaced:
        text += f"; unloaded version {', '.join(map(str, done.replaced))} after {done.seconds:.1f} s"
    emit(asdict(done), as_json, text)


@command.command(name="lint")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--load", is_flag=True, help="Also load each sound model on a real server, and ask it once.")
@click.option("--load-timeout", type=float, default=1800.0, show_default=True, help="Seconds, for one model.")
@click.option(
    "--version",
    "release",
    default="",
    help="Release of TensorRT-LLM, for model.yaml. Default: engine.json's.",
)
@click.option("--no-paths", is_flag=True, help="The server is elsewhere: skip what its paths lead to.")
@json_option
@click.pass_context
def lint(
    ctx: click.Context,
    directory: Path,
    load: bool,
    load_timeout: float,
    release: str,
    no_paths: bool,
    as_json: bool,
) -> None:
    """Check any Triton model repository, or one model's directory; exit status 1 when a rule is broken.

    \b
    toolchain triton lint triton_repo/demo-moe-nvfp4
    toolchain triton lint /models --load                  also on a real tritonserver
    toolchain triton lint /models --version 1.2.1         keys of model.yaml in that release
    """
    from toolchain.triton.lint import read_and_lint
    from toolchain.triton.lint_load import Outcome, load_repository

    found = read_and_lint(directory, check_paths=not no_paths, release=release)
    findings = list(found.findings)
    outcomes: list[Outcome] = []
    if load and found.models:
        broken = frozenset(item.where.split(":", 1)[0].split("/", 1)[0] for item in errors(findings))
        outcomes, loaded = load_repository(
            directory, found.models, broken, timeout_s=load_timeout, progress=Terminal()
        )
        findings += loaded
    value = {
        "directory": str(directory),
        "findings": [finding.to_json() for finding in findings],
        "models": [item.to_json() for item in found.models],
        **({"loaded": [item.to_json() for item in outcomes]} if load else {}),
    }
    lines = [*map(str, findings), *(f"  {item}" for item in found.models)]
    lines += [f"  {item.model}: {item.state}: {item.said}" for item in outcomes if item.state == "answered"]
    count = len(errors(findings))
    lines.append(
        f"{directory}: {count} errors, {len(findings) - count} warnings"
        if findings
        else f"{directory}: nothing found"
    )
    emit(value, as_json, "\n".join(lines))
    if count:
        ctx.exit(1)


@command.command(name="install")
@click.option(
    "--output", type=PATH, help="Directory. Default: .cache/tritonserver, or TOOLCHAIN_TRITONSERVER."
)
@dry_run_option
@force_option
@json_option
def install(output: Path | None, dry_run: bool, force: bool, as_json: bool) -> None:
    """Install the real tritonserver that the nvidia-pytriton package carries, apart from this environment."""
    from toolchain.triton.install import WHEEL, install_server, server_directory

    target = (output or server_directory()).absolute()
    if not dry_run:
        install_server(target, progress=Terminal(), force=force)
    value = {"directory": str(target), "package": WHEEL, "dry_run": dry_run}
    emit(value, as_json, f"would install {WHEEL} into {target}" if dry_run else f"tritonserver: {target}")
