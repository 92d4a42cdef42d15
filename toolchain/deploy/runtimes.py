"""The servers that a pod can run: image, command on one node or several, port and question for the health probe."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.build.llmapi.commands import ARGUMENTS
from toolchain.core.errors import UsageError
from toolchain.core.images import Image, get_image, triton_image, trtllm_image
from toolchain.deploy.serving import peer_command
from toolchain.deploy.settings import Placement, read_checkpoint
from toolchain.triton.engine_dir import EngineDir

ENGINE = "/engine"
REPOSITORY = "/repository"
HEALTH = "/opt/toolchain"
PORT = 8000
RENDEZVOUS = 29500
"""Where the nodes of vLLM and SGLang meet; torch.distributed's usual port."""
TARGETS: dict[str, tuple[str, ...]] = {
    "local": ("local",),
    "trtllm": ("trtllm-serve", "triton", "vllm", "sglang"),
    "tensorrt": ("triton",),
}
"""Engine target -> runtimes that can serve it, the first by default."""


@dataclass(frozen=True, kw_only=True)
class Server:
    runtime: str
    image: Image | None
    """None: no published image is known, so the user has to name one."""
    leader: tuple[str, ...]
    """Command of the pod, on several nodes of the one that answers requests."""
    worker: tuple[str, ...] = ()
    """Command of the other nodes."""
    probe: tuple[str, ...]
    """What the health script is called with."""
    ports: tuple[tuple[str, int], ...] = (("http", PORT),)
    scripts: tuple[str, ...] = ("health.py",)
    """Files of ``templates/`` that run beside the server."""
    keeps_entry: bool = False
    """Whether the image's entry point runs the command: NVIDIA's prepare CUDA's compatibility libraries in theirs."""
    repository: bool = False
    """Whether it needs the Triton model repository as well."""
    ssh: bool = False
    """Whether its nodes reach each other by ssh."""


def choose(engine: EngineDir, runtime: str, placement: Placement) -> Server:
    """The server for ``engine``; UsageError for a runtime that cannot serve it, or not on that many nodes."""
    runtimes = TARGETS.get(engine.target, ())
    chosen = runtime or next(iter(runtimes), "")
    if engine.target == "local" and chosen in ("vllm", "sglang"):
        raise UsageError(
            f"{engine.path} was planned for the local runtime on {engine.manifest.get('gpu', 'cpu')}: nothing is known "
            f"of GPUs for {chosen}",
            hint="`toolchain build ENGINE --target trtllm --gpu GPU` plans the same checkpoint for a GPU",
            code="TC-450",
        )
    if chosen not in runtimes:
        raise UsageError(
            f"--runtime {chosen!r} does not serve engines of target {engine.target}",
            hint=f"choose one of {', '.join(runtimes)}" if runtimes else "build it for another target",
            code="TC-450",
        )
    if chosen in ("vllm", "sglang"):
        return _peer(engine, chosen, placement)
    return {"local": _local, "trtllm-serve": _trtllm_serve, "triton": _triton}[chosen](engine, placement)


def _local(engine: EngineDir, placement: Placement) -> Server:
    words = ["toolchain", "serve", ENGINE, "--repository", "/tmp/repository", "--address", "0.0.0.0"]
    return Server(
        runtime="local",
        image=get_image("LOCAL"),
        leader=tuple(words),
        probe=("--triton", _url()),
        ports=_triton_ports(),
    )


def _trtllm_serve(engine: EngineDir, placement: Placement) -> Server:
    """``--extra_llm_api_options``: every release since 0.17 knows it; newer ones call it ``--config`` as well."""
    if not (engine.path / ARGUMENTS).is_file():
        raise UsageError(
            f"{engine.path / ARGUMENTS} is missing: trtllm-serve needs it",
            hint="build the engine again",
            code="TC-611",
        )
    words = [
        "trtllm-serve",
        f"{ENGINE}/{engine.manifest['checkpoint']}",
        "--host",
        "0.0.0.0",
        "--port",
        str(PORT),
    ]
    words += ["--extra_llm_api_options", f"{ENGINE}/{ARGUMENTS}"]
    script = ("bash", f"{HEALTH}/mpi_node.sh", str(placement.gpus))
    several = placement.nodes > 1
    return Server(
        runtime="trtllm-serve",
        image=trtllm_image(str(engine.manifest["target_version"])),
        leader=(*script, *words) if several else tuple(words),
        worker=script if several else (),
        probe=("--openai", _url()),
        scripts=("health.py", "mpi_node.sh") if several else ("health.py",),
        keeps_entry=True,
        ssh=several,
    )


def _triton(engine: EngineDir, placement: Placement) -> Server:
    if placement.nodes > 1:
        raise UsageError(
            f"{placement.nodes} nodes: Triton serves an engine of one node here",
            hint="--runtime trtllm-serve, vllm or sglang run over several nodes",
            code="TC-451",
        )
    legacy = engine.target == "tensorrt"
    words = ["tritonserver", f"--model-repository={REPOSITORY}"]
    if legacy:
        words = ["bash", f"{HEALTH}/triton_ranks.sh", str(placement.world_size)]
    return Server(
        runtime="triton",
        image=triton_image(str(engine.manifest["target_version"])),
        leader=tuple(words),
        probe=("--triton", _url(), "--model", "ensemble") if legacy else ("--triton", _url()),
        ports=_triton_ports(),
        scripts=("health.py", "triton_ranks.sh") if legacy else ("health.py",),
        keeps_entry=True,
        repository=True,
    )


def _peer(engine: EngineDir, runtime: str, placement: Placement) -> Server:
    command = peer_command(runtime, read_checkpoint(engine, f"{ENGINE}/{engine.manifest['checkpoint']}"))
    if command.refused:
        raise UsageError(f"--runtime {runtime}: {command.refused}", hint="use trtllm-serve", code="TC-450")
    words = (*command.words, "--host", "0.0.0.0", "--port", str(PORT), "--served-model-name", engine.name)
    leader, worker = _several_nodes(runtime, words) if placement.nodes > 1 else (words, ())
    return Server(
        runtime=runtime,
        image=get_image(runtime.upper()),
        leader=leader,
        worker=worker,
        probe=("--openai", _url()),
    )


def _several_nodes(runtime: str, words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(leader, worker). ``$(NAME)`` is filled in by Kubernetes from what the LeaderWorkerSet sets."""
    if runtime == "sglang":
        meet = f"$(LWS_LEADER_ADDRESS):{RENDEZVOUS}"
        both = (*words, "--nnodes", "$(LWS_GROUP_SIZE)", "--dist-init-addr", meet)
        return (*both, "--node-rank", "0"), (*both, "--node-rank", "$(LWS_WORKER_INDEX)")
    meet_options = ("--master-addr", "$(LWS_LEADER_ADDRESS)", "--master-port", str(RENDEZVOUS))
    both = (*words, "--distributed-executor-backend", "mp", "--nnodes", "$(LWS_GROUP_SIZE)", *meet_options)
    return (*both, "--node-rank", "0"), (*both, "--node-rank", "$(LWS_WORKER_INDEX)", "--headless")


def _url() -> str:
    return f"http://127.0.0.1:{PORT}"


def _triton_ports() -> tuple[tuple[str, int], ...]:
    return (("http", PORT), ("grpc", 8001), ("metrics", 8002))
