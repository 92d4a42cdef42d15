"""The Ray cluster that there is: none is started here, and no dashboard, telemetry or port is opened."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError

CONNECT_TIMEOUT_S = 10.0
START_ONE = (
    "start one: `ray start --head` on this machine, `ray start --address HOST:6379` on each other one; `ray stop` "
    "forgets one that crashed"
)
LOOPBACK = ("localhost", "127.0.0.1")
"""Ray takes them for this machine's address in its network (``resolve_ip_for_localhost``, 2.60)."""


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The ``ray`` module, connected to ``address`` (host:port), to RAY_ADDRESS, or to a cluster on this machine.

    A connection that the process has already is used, and kept. UsageError TC-236 without Ray, or for an address of
    another kind; ToolchainError TC-237 when no cluster answers.
    """
    ray = _import()
    if ray.is_initialized():
        yield ray
        return
    given = address or os.environ.get("RAY_ADDRESS") or "auto"
    if given != "auto":
        _require_reachable(ray, given)
    try:
        ray.init(address=given, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _nobody(given, str(error).splitlines()[0]) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def alive_nodes(ray: Any) -> list[dict[str, float]]:
    """Resources (CPU, GPU, ...) of every node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def slots(ray: Any, cpus: int, gpus: int = 0) -> int:
    """Tasks of so many CPUs and GPUs that the cluster could run at once as it is now."""
    counts = []
    for node in alive_nodes(ray):
        fits = node.get("CPU", 0) // cpus
        counts.append(int(min(fits, node.get("GPU", 0) // gpus) if gpus else fits))
    return sum(counts)


def require_device(ray: Any, device: str) -> str:
    """``cpu`` or ``cuda``; auto is CUDA where a node has GPUs, and then nodes without one have nothing to do.

    UsageError TC-236 for a device that the cluster has not, or that only Ray can choose (``cuda:1``).
    """
    gpus = sum(node.get("GPU", 0) for node in alive_nodes(ray))
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not gpus):
        raise UsageError(
            f"--device {device} with --executor ray: the cluster has {gpus:g} GPUs, and Ray gives them out",
            hint="use --device cpu, cuda or auto",
            code="TC-236",
        )
    return device


def require_cpus(ray: Any, cpus: int | None) -> None:
    """UsageError TC-236 when no node has so many: no task would ever start."""
    largest = max((node.get("CPU", 0) for node in alive_nodes(ray)), default=0)
    if cpus is not None and largest and cpus > largest:
        raise UsageError(f"--ray-cpus {cpus}: the largest node has {largest:g} CPUs", code="TC-236")


def _import() -> Any:
    # Nothing about a user's run leaves the cluster; and where a stale address file says that a cluster is here, Ray
    # would look for it for more than ten minutes.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--executor ray needs the package ray, which is not installed",
            hint="pip install 'toolchain[ray]', on every node",
            code="TC-236",
        ) from error
    return ray


def _require_reachable(ray: Any, address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UsageError(f"Ray address {address!r}, expected host:port of the cluster's head", code="TC-236")
    taken = ray.util.get_node_ip_address() if host in LOOPBACK else host.strip("[]")
    try:
        socket.create_connection((taken, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        said = f"Ray takes it for {taken}, and a cluster on loopback alone is 127.0.0.2; " * (taken != host)
        raise _nobody(address, f"{said}{error}") from error


def _nobody(address: str, reason: str) -> ToolchainError:
    where = "on this machine, and RAY_ADDRESS is not set" if address == "auto" else f"at {address}"
    return ToolchainError(f"no Ray cluster can be used {where}: {reason}", hint=START_ONE, code="TC-237")
