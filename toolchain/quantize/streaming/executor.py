"""Who does the packing of a streamed run: threads of this process, or the workers of a Ray cluster.

The bytes are the same, so a run may be begun with one and go on with the other. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress

if TYPE_CHECKING:
    from toolchain.quantize.streaming.datafree import Source
    from toolchain.quantize.streaming.journal import Journal
    from toolchain.quantize.streaming.outline import Shard

LOCAL, RAY = "local", "ray"
EXECUTORS = (LOCAL, RAY)


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """What the user asked for. UsageError TC-236 for options that do not go together."""

    name: str = LOCAL
    """One of EXECUTORS."""
    ray_address: str | None = None
    """``host:port`` of the cluster's head; None: RAY_ADDRESS, or a cluster that runs on this machine."""
    ray_cpus: int | None = None
    """CPUs of one task; None: those of the cluster, shared out among the shards."""

    def __post_init__(self) -> None:
        if self.name not in EXECUTORS:
            raise UsageError(f"unknown executor {self.name!r}; expected local or ray", code="TC-236")
        if self.name != RAY and (self.ray_address is not None or self.ray_cpus is not None):
            raise UsageError(
                f"--ray-address and --ray-cpus with --executor {self.name}",
                hint="they are for --executor ray",
                code="TC-236",
            )
        if self.ray_cpus is not None and self.ray_cpus < 1:
            raise UsageError(f"--ray-cpus is {self.ray_cpus} (expected at least 1)", code="TC-236")

    def wish(self, stream: bool | None) -> bool | None:
        """What to do about streaming where the user said ``stream``: other machines can only pack what is streamed."""
        if self.name == LOCAL:
            return stream
        if stream is False:
            raise UsageError(
                f"--no-stream with --executor {self.name}",
                hint="a model in memory is in the memory of one machine: leave one of them out",
                code="TC-236",
            )
        return True


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of some shards."""

    hashes: dict[str, str] = field(default_factory=dict)
    """File -> SHA-256."""
    cast: dict[str, dict[str, int]] = field(default_factory=dict)
    """Tensor -> blocks that were cast from MXFP4 (``Packer.cast``)."""
    details: dict[str, Any] = field(default_factory=dict)
    """For the manifest."""


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """Tensors of a calibrated layer that follow from the source and from the ranges that were found."""

    names: tuple[str, ...]
    """In the source."""
    input_amax: Mapping[str, float | None] = field(default_factory=dict)
    """Module -> largest magnitude of its inputs, a float32 number, that calibration found; None: nothing is stored."""


class Executor(Protocol):
    device: str
    """``cpu`` or ``cuda``, with or without an index: for the manifest."""
    about: dict[str, Any]
    """For the manifest: what packs, where that is not this process."""

    def write_shards(
        self, source: Source, todo: list[Shard], journal: Journal, *, progress: Progress
    ) -> Written:
        """Write the shards of ``todo`` and finish each in ``journal``. What is finished stays when one fails."""

    def pieces(self, source: Source, journal: Journal) -> AbstractContextManager[Pieces | None]:
        """Who packs parts of layers; None: a layer is packed where it is calibrated."""


class Pieces(Protocol):
    """Packs parts of layers elsewhere, into files of their own: two machines that write the same file overwrite each
    other's pages on NFS."""

    def begin(self, jobs: Sequence[PackJob]) -> Iterator[tuple[PackJob, Path]]:
        """Begin all ``jobs`` at once; then each with the safetensors file that it made, as they are finished. The
        caller removes the files."""


@contextmanager
def open_executor(
    options: ExecutorOptions, *, device: str = "auto", threads: int | None = None
) -> Iterator[Executor]:
    """The executor that ``options`` name. ``threads``: of the local one; None: one per core.

    Errors as ``ray_cluster.connected`` and ``pick_device``.
    """
    if options.name == LOCAL:
        from toolchain.quantize.streaming.local_executor import LocalExecutor

        yield LocalExecutor(device, threads)
        return
    from toolchain.quantize.streaming.ray_cluster import connected
    from toolchain.quantize.streaming.ray_executor import RayExecutor

    with connected(options.ray_address) as ray:
        yield RayExecutor(ray, device=device, cpus=options.ray_cpus)
