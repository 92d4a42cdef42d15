"""The nearest things that work in place of what does not."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.core.gpus import GPUS, Gpu
from toolchain.formats import FORMATS
from toolchain.formats.base import Format
from toolchain.targets.base import Target
from toolchain.targets.rows import Model
from toolchain.targets.version import parse_version


def native(target: Target, version: str, gpu: Gpu, model: Model) -> Iterator[Format]:
    """Formats that run on this GPU without limits."""
    for candidate in FORMATS:
        row = target.find(format_name=candidate.name, sm=gpu.sm, model=model, version=version)
        if row is not None and row.state == "yes":
            yield candidate


def alternatives(target: Target, version: str, gpu: Gpu, format: Format, model: Model) -> Iterator[str]:
    """A later release, another format, another GPU, emulation: each a phrase for a hint."""
    for later in target.versions:
        row = target.find(format_name=format.name, sm=gpu.sm, model=model, version=later)
        if row is not None and parse_version(later) > parse_version(version):
            backend = f" with moe_config.backend {row.backend}" if row.backend and model == "moe" else ""
            limits = " and runs as W4A16" if row.backend == "MARLIN" else ""
            yield f"needs >= {later}{backend}{limits}"
            break
    names = [item.name for item in native(target, version, gpu, model)]
    if names:
        yield f"--format {' or '.join(names)}, native on {gpu.name}"
    states: dict[str, list[str]] = {"yes": [], "limited": []}
    for item in GPUS:
        row = target.find(format_name=format.name, sm=item.sm, model=model, version=version)
        if row is not None:
            states[row.state].append(item.name)
    if states["yes"]:
        yield f"--gpu {' or '.join(states['yes'])}"
    elif states["limited"]:
        yield f"--gpu {' or '.join(states['limited'])}, with limits"
    yield "--target local, which emulates it anywhere"
