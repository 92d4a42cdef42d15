"""toolchain triton ENGINE (render), toolchain triton lint DIR, toolchain triton install"""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import ENGINE, PATH, allow_unfit_option, dry_run_option, force_option, json_option
from toolchain.cli.output import Terminal, emit
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
    toolchain triton lint DIR [--load]        check a repository, with --load on a real server
    toolchain triton install                  install a real tritonserver for this machine
    """


@command.command(name="render")
@click.argument("engine", type=ENGINE)
@click.option("--output", type=PATH, help="Repository directory. Default: triton_repo/<engine>.")
@click.option(
    "--served-engine-dir", type=PATH, help="Where the server sees ENGINE, if elsewhere (a container's mount)."
)
@click.option("--instances", type=int, default=1, show_default=True, help="Target trtllm: how many LLMs.")
@click.option("--gpu-device-ids", default="", help='Target trtllm: GPUs of each instance, such as "0,1;2,3".')
@allow_unfit_option
@dry_run_option
@force_option
@json_option
def render(
    engine: Path,
    output: Path | None,
    served_engine_dir: Path | None,
    instances: int,
    gpu_device_ids: str,
    allow_unfit: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Render the Triton model repository of ENGINE."""
    from toolchain.evaluate.gates import require_fit
    from toolchain.triton.engine_dir import read_engine_dir
    from toolchain.triton.render import render_repository

    found = read_engine_dir(engine)
    require_fit(engine, found.manifest, allow_unfit=allow_unfit)
    target = output or Path("triton_repo") / found.name
    if not dry_run:
        render_repository(
            engine,
            target,
            force=force,
            served_engine_dir=served_engine_dir,
            instances=instances,
            gpu_device_ids=gpu_device_ids,
            allow_unfit=allow_unfit,
        )
    value = {"engine": str(engine), "target": found.target, "repository": str(target), "dry_run": dry_run}
    emit(value, as_json, f"{'would render' if dry_run else 'rendered'} {target} (target {found.target})")


@command.command(name="lint")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--load", is_flag=True, help="Also load it on a real server and ask for one inference.")
@json_option
@click.pass_context
def lint(ctx: click.Context, directory: Path, load: bool, as_json: bool) -> None:
    """Check a Triton model repository; exit status 1 when a rule is broken."""
    from toolchain.triton.lint import lint_repository

    findings = lint_repository(directory)
    if load and not errors(findings):
        from toolchain.triton.server import TritonServer

        with TritonServer(directory, http_port=0, grpc_port=0, metrics_port=0, progress=Terminal()) as server:
            click.echo(f"loaded on a real server and answered: {server.http_url}", err=True)
    value = {"directory": str(directory), "findings": [finding.to_json() for finding in findings]}
    emit(value, as_json, "\n".join(map(str, findings)) or f"{directory}: nothing found")
    if errors(findings):
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
