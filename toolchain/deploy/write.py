"""Writes the deployment of one engine: Kubernetes manifests, and the commands that serve it elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.build.tensorrt import read_lock, require_built
from toolchain.core.errors import UsageError
from toolchain.core.files import (
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    refuse_to_replace_source,
)
from toolchain.core.images import get_image
from toolchain.deploy.kubernetes import Manifests
from toolchain.deploy.runtimes import ENGINE, choose
from toolchain.deploy.serving import Command, peer_command
from toolchain.deploy.settings import DeploySettings, object_name, place, read_checkpoint
from toolchain.evaluate.gates import require_fit
from toolchain.triton.engine_dir import EngineDir, read_engine_dir

PEERS = ("vllm", "sglang")
HEADING = "# Rendered by `toolchain deploy`; not run where it was rendered: there was no cluster.\n"


def prepare(engine_dir: Path, settings: DeploySettings, *, allow_unfit: bool = False) -> Manifests:
    """Everything decided, nothing written. UsageError for what cannot be served so."""
    engine = read_engine_dir(engine_dir)
    require_fit(engine.path, engine.manifest, allow_unfit=allow_unfit)
    if settings.replicas < 0:
        raise UsageError(f"--replicas {settings.replicas}: expected 0 or more", code="TC-451")
    if engine.target == "tensorrt":
        require_built(engine.path, read_lock(engine.path))
    placement = place(engine, settings)
    server = choose(engine, settings.runtime, placement)
    image = settings.image or (server.image.pinned if server.image else "")
    if not image:
        raise UsageError(
            f"no published Triton image is known to carry TensorRT-LLM {engine.manifest.get('target_version')}",
            hint="name one with --image" + (", or use --runtime trtllm-serve" * (engine.target == "trtllm")),
            code="TC-453",
        )
    return Manifests(
        engine=engine,
        settings=settings,
        placement=placement,
        server=server,
        name=object_name(engine, settings.name),
        image=image,
    )


def deploy_engine(
    engine_dir: Path,
    output: Path,
    settings: DeploySettings,
    *,
    force: bool = False,
    allow_unfit: bool = False,
) -> Manifests:
    """Write ``output``/manifests.yaml and commands.json; nothing is left behind where something cannot be served."""
    manifests = prepare(engine_dir, settings, allow_unfit=allow_unfit)
    refuse_to_replace_source(output, manifests.engine.path)
    with atomic_directory(output, force=force) as partial:
        atomic_write_text(partial / "manifests.yaml", render_yaml(manifests.objects()))
        atomic_write_json(partial / "commands.json", commands_json(manifests.engine))
    return manifests


def peers(engine: EngineDir) -> list[Command]:
    """vLLM's and SGLang's command for the engine's checkpoint, or why they do not load it."""
    checkpoint = read_checkpoint(engine, f"{ENGINE}/{engine.manifest['checkpoint']}")
    return [peer_command(runtime, checkpoint) for runtime in PEERS]


def commands_json(engine: EngineDir) -> dict[str, Any]:
    """What to run in which image, with the engine's directory mounted read-only at ``/engine``."""
    commands = [
        {"image": get_image(command.runtime.upper()).pinned, **command.to_json()} for command in peers(engine)
    ]
    return {"engine": engine.name, "mount": ENGINE, "commands": commands}


def render_yaml(objects: list[dict[str, Any]]) -> str:
    """A stream of documents; scripts of several lines as blocks, and no references between documents."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    documents = (yaml.dump(value, Dumper=Dumper, sort_keys=False, width=110) for value in objects)
    return HEADING + "---\n".join(documents)
