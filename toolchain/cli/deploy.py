"""toolchain deploy"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.options import (
    ENGINE,
    PATH,
    allow_unfit_option,
    dry_run_option,
    force_option,
    json_option,
)
from toolchain.cli.output import Terminal, emit, facts

if TYPE_CHECKING:
    from toolchain.deploy.kubernetes import Manifests
    from toolchain.deploy.serving import Command

RUNTIMES = ("local", "trtllm-serve", "triton", "vllm", "sglang")


@click.command(name="deploy")
@click.argument("engine", type=ENGINE)
@click.option("--output", type=PATH, help="Directory. Default: deploy/<engine>.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="What serves it. Default: trtllm-serve for target trtllm, triton for tensorrt, local for local.",
)
@click.option(
    "--name", default="", help="Name of the Kubernetes objects. Default: made of the engine's name."
)
@click.option(
    "--claim",
    default="models",
    show_default=True,
    help="PersistentVolumeClaim that holds engines/ and triton_repo/, mounted read-only.",
)
@click.option("--image", default="", help="Image to run. Default: as toolchain/core/versions.env has it.")
@click.option("--replicas", type=int, default=1, show_default=True, help="Copies of the whole engine.")
@click.option(
    "--gpus-per-node",
    type=int,
    default=8,
    show_default=True,
    help="GPUs of a node; an engine with more of them becomes a LeaderWorkerSet.",
)
@click.option(
    "--node-selector", multiple=True, metavar="KEY=VALUE", help="Label that a node must have; several times."
)
@click.option(
    "--startup-minutes",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="How long loading may take before the pod is started again.",
)
@allow_unfit_option
@dry_run_option
@force_option
@json_option
def command(
    engine: Path,
    output: Path | None,
    runtime: str | None,
    name: str,
    claim: str,
    image: str,
    replicas: int,
    gpus_per_node: int,
    node_selector: tuple[str, ...],
    startup_minutes: int,
    allow_unfit: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Render the Kubernetes manifests that serve ENGINE, with probes that infer, and its vLLM and SGLang commands.

    GPUs are those of the plan (tp x pp). The volume holds the two folders as they stand here; nothing is applied.
    """
    from toolchain.deploy.nim_checks import check_readable
    from toolchain.deploy.settings import DeploySettings
    from toolchain.deploy.write import deploy_engine, peers, prepare

    settings = DeploySettings(
        runtime=runtime or "",
        name=name,
        claim=claim,
        image=image,
        replicas=replicas,
        gpus_per_node=gpus_per_node,
        node_selector=tuple(_pair(text) for text in node_selector),
        startup_minutes=startup_minutes,
    )
    done = prepare(engine, settings, allow_unfit=allow_unfit)
    target = output or Path("deploy") / done.engine.name
    if not dry_run:
        deploy_engine(engine, target, settings, force=force, allow_unfit=allow_unfit)
    if done.server.runtime == "local" and not image:
        Terminal().note(
            f"{done.image} is what docker/local.Dockerfile builds: push it, and name it with --image"
        )
    for finding in check_readable(done.engine.checkpoint):
        Terminal().note(str(finding))
    _show(done, peers(done.engine), target, dry_run=dry_run, as_json=as_json)


def _show(done: Manifests, commands: list[Command], target: Path, *, dry_run: bool, as_json: bool) -> None:
    from toolchain.deploy.runtimes import PORT

    kinds = [str(item["kind"]) for item in done.objects()]
    value = {
        "engine": str(done.engine.path),
        "output": str(target),
        "name": done.name,
        "url": f"http://{done.service_name}:{PORT}",
        "runtime": done.server.runtime,
        "image": done.image,
        "kinds": kinds,
        "nodes": done.placement.nodes,
        "gpus_per_node": done.placement.gpus,
        "commands": [each.to_json() for each in commands],
        "dry_run": dry_run,
    }
    where = f"{done.placement.nodes} x {done.placement.gpus} GPUs" if done.placement.gpus else "CPU"
    rows = [
        ("would write" if dry_run else "written", target),
        ("runtime", f"{done.server.runtime} ({done.image})"),
        ("objects", f"{', '.join(kinds)} {done.name}, {where}"),
        ("url", f"http://{done.service_name}:{PORT}, from pods of the same namespace"),
        *((each.runtime, each.text or f"no: {each.refused}") for each in commands),
        ("next", f"kubectl apply -f {target}/manifests.yaml"),
    ]
    emit(value, as_json, facts(rows))


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--node-selector")
    return key, value
