"""Targets: what runs an engine. A new target is one file here and one entry in ``TARGETS``."""

from __future__ import annotations

from toolchain.core.findings import Finding
from toolchain.core.gpus import Gpu
from toolchain.core.lookup import pick
from toolchain.formats.base import Format
from toolchain.targets.base import Row, Target
from toolchain.targets.listing import SupportRow, support_rows
from toolchain.targets.local import LOCAL
from toolchain.targets.support import check_target
from toolchain.targets.tensorrt import TENSORRT
from toolchain.targets.trtllm import LINES, TRTLLM, BackendState, Wish, moe_backend, moe_backends
from toolchain.targets.version import Version, parse_version

TARGETS: tuple[Target, ...] = (LOCAL, TRTLLM, TENSORRT)


def get_target(name: str) -> Target:
    """The target called ``name``; UsageError lists the alternatives."""
    hint = "`toolchain list targets` describes each"
    return pick(TARGETS, name, kind="target", hint=hint, code="TC-103")


def check(
    target: str, version: str | None, gpu: Gpu, format: Format, is_moe: bool, kv_cache: str = "none"
) -> list[Finding]:
    """See ``check_target``; ``version`` None means the target's default."""
    found = get_target(target)
    return check_target(found, version or found.default_version, gpu, format, is_moe, kv_cache)


def support_table(
    *, gpu: str | None = None, format: str | None = None, version: str | None = None
) -> list[SupportRow]:
    """The rows of ``toolchain support``: every target, and every GPU and format that is not narrowed down."""
    if version:
        parse_version(version)
    return support_rows(TARGETS, gpu=gpu, format=format, version=version)


__all__ = [
    "LINES",
    "LOCAL",
    "TARGETS",
    "TENSORRT",
    "TRTLLM",
    "BackendState",
    "Row",
    "SupportRow",
    "Target",
    "Version",
    "Wish",
    "check",
    "get_target",
    "moe_backend",
    "moe_backends",
    "parse_version",
    "support_table",
]
