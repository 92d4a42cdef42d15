"""What ``toolchain bench`` is pointed at, as a target to connect to."""

from __future__ import annotations

from pathlib import Path

from toolchain.bench.address import find_target, parse_address
from toolchain.bench.settings import Settings
from toolchain.bench.targets.base import TargetSpec
from toolchain.core.errors import UsageError
from toolchain.triton.contract import MODEL_NAME
from toolchain.triton.server import TritonServer

PROTOCOLS = {
    "triton-grpc": "gRPC streaming",
    "triton-http": "HTTP generate_stream",
    "openai": "OpenAI {endpoint}, streaming",
    "inprocess": "the engine in this process",
}


def target_of(server: TritonServer | Path | str, settings: Settings, model: str) -> tuple[TargetSpec, bool]:
    """What to connect to, and whether it runs on this machine. UsageError TC-701 for what does not go together."""
    kind, local = settings.target, True
    if isinstance(server, TritonServer):
        kind = "triton-grpc" if kind == "auto" else kind
        if kind not in ("triton-grpc", "triton-http"):
            raise UsageError(f"target {kind} is not what a Triton server speaks", code="TC-701")
        url = server.grpc_url if kind == "triton-grpc" else server.http_url
    elif isinstance(server, Path):
        if kind not in ("auto", "inprocess"):
            raise UsageError(f"target {kind} needs a server, {server} is an engine", code="TC-701")
        kind, url = "inprocess", str(server)
    else:
        address = parse_address(server)
        kind = find_target(address, kind)
        url, local = address.url(kind), address.local
    name = model or (MODEL_NAME if kind.startswith("triton") else "")
    spec = TargetSpec(
        kind=kind,
        url=url,
        model=name,
        endpoint=settings.endpoint,
        seed=settings.seed,
        ignore_eos=settings.ignore_eos,
    )
    return spec, local
