"""What is said about a deployment beyond the engine itself, and the engine's own figures that it needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.build.tensorrt.command import ENGINE
from toolchain.core.errors import UsageError
from toolchain.core.files import read_json
from toolchain.core.roles import Role
from toolchain.deploy.serving import Checkpoint
from toolchain.formats import get_format
from toolchain.triton.engine_dir import EngineDir

GIB = 1024**3
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
"""RFC 1035 label: what Kubernetes takes as the name of a Service."""
NAME_LIMIT = 50
"""A LeaderWorkerSet adds ``-group-worker`` and hashes to the name; labels end at 63 characters."""


@dataclass(frozen=True, kw_only=True)
class DeploySettings:
    runtime: str = ""
    """``local``, ``trtllm-serve``, ``triton``, ``vllm`` or ``sglang``; empty: what the engine's target runs on."""
    name: str = ""
    """Of the Kubernetes objects; empty: made of the engine's name."""
    claim: str = "models"
    """PersistentVolumeClaim that holds ``engines/`` and ``triton_repo/``."""
    image: str = ""
    """Empty: the one of ``core/versions.env``."""
    replicas: int = 1
    gpus_per_node: int = 8
    node_selector: tuple[tuple[str, str], ...] = ()
    startup_minutes: int = 60
    """How long loading may take before the pod is started again."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """GPUs of one replica."""

    world_size: int
    nodes: int

    @property
    def gpus(self) -> int:
        """Of one node."""
        return self.world_size // self.nodes


def place(engine: EngineDir, settings: DeploySettings) -> Placement:
    """Nodes and GPUs of one replica; UsageError where they do not divide. 0 GPUs for an engine of a CPU."""
    parallel = engine.manifest.get("parallel", {})
    world = int(parallel.get("tp", 1)) * int(parallel.get("pp", 1))
    if engine.target == "local":
        return Placement(world_size=0 if engine.manifest.get("gpu", "cpu") == "cpu" else 1, nodes=1)
    if settings.gpus_per_node < 1:
        raise UsageError(f"--gpus-per-node {settings.gpus_per_node}: expected 1 or more", code="TC-451")
    nodes = -(-world // settings.gpus_per_node)
    if world % nodes:
        raise UsageError(
            f"tp {parallel.get('tp')} x pp {parallel.get('pp')} = {world} GPUs do not spread evenly over {nodes} nodes "
            f"of {settings.gpus_per_node}",
            hint="give another --gpus-per-node, or build the engine with another --tp",
            code="TC-451",
        )
    return Placement(world_size=world, nodes=nodes)


def object_name(engine: EngineDir, wished: str = "") -> str:
    """``wished``, checked, or the engine's name as Kubernetes takes it."""
    if wished:
        if not LABEL.fullmatch(wished) or len(wished) > NAME_LIMIT:
            raise UsageError(
                f"--name {wished!r} is no name of a Kubernetes Service: lower case letters, digits and -, beginning "
                f"with a letter, at most {NAME_LIMIT} characters",
                code="TC-452",
            )
        return wished
    words = re.sub(r"[^a-z0-9]+", "-", engine.name.lower()).strip("-")
    name = words if words[:1].isalpha() else f"engine-{words}"
    return name[:NAME_LIMIT].strip("-")


def weight_bytes(engine: EngineDir) -> int:
    """Bytes that the server reads: the checkpoint's shards, or the TensorRT engine's ranks."""
    if engine.target == "tensorrt":
        return sum(path.stat().st_size for path in (engine.path / ENGINE).glob("rank*.engine"))
    return sum(path.stat().st_size for path in engine.checkpoint.glob("*.safetensors"))


def read_checkpoint(engine: EngineDir, model: str) -> Checkpoint:
    """The engine as a command line sees it; ``model``: where the server finds the checkpoint."""
    manifest = engine.manifest
    plan = _plan(engine.path)
    algos = {get_format(name).quant_algo for name in manifest.get("formats", (manifest.get("format"),))}
    parallel, limits = manifest.get("parallel", {}), manifest.get("limits", {})
    return Checkpoint(
        model=model,
        name=engine.name,
        architecture=str(manifest.get("model", {}).get("architecture", "")),
        quant_algo=str(manifest.get("quant_algo")),
        algos=frozenset(algos),
        kv_cache=str(manifest.get("kv_cache", "none")),
        is_moe=any(item["role"] == Role.ROUTED_EXPERT.value for item in plan.get("assignments", ())),
        tp=int(parallel.get("tp", 1)),
        ep=int(parallel.get("ep", 1)),
        pp=int(parallel.get("pp", 1)),
        max_batch_size=limits.get("max_batch_size"),
        max_seq_len=limits.get("max_seq_len"),
    )


def _plan(engine: Path) -> dict[str, Any]:
    path = engine / "plan.json"
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
