"""Questions to the support tables: does it run, and if not, what is the nearest thing that does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from toolchain.core.errors import UsageError
from toolchain.core.findings import Finding
from toolchain.core.gpus import Gpu
from toolchain.formats import KV_CACHES
from toolchain.formats.base import Format
from toolchain.targets.alternatives import alternatives, native
from toolchain.targets.backends import Wish, choose_backend
from toolchain.targets.base import PartKind, Target
from toolchain.targets.known_bad import Case
from toolchain.targets.rows import Model
from toolchain.targets.trtllm import REASONS
from toolchain.targets.version import parse_version


def check_target(
    target: Target, version: str, gpu: Gpu, format: Format, is_moe: bool, kv_cache: str = "none"
) -> list[Finding]:
    """``check_parts`` for a model in one format; ``is_moe`` says whether routed experts are quantized."""
    return check_parts(target, version, gpu, ((format, "moe" if is_moe else "dense"),), kv_cache)


def check_parts(
    target: Target,
    version: str,
    gpu: Gpu,
    parts: Iterable[tuple[Format, PartKind]],
    kv_cache: str = "none",
) -> list[Finding]:
    """Every reason why ``target`` at ``version`` would not run these parts on this GPU, and every warning.

    Each error's hint names the nearest things that work. Of a format that does not run for its first kind of part, the
    others are not listed too.
    """
    findings = [*_general(target, version)]
    if target.needs_gpu and gpu.sm == 0:
        hint = "choose --gpu (`toolchain list gpus`), or --target local, which runs on a CPU"
        message = f"{target.name} needs an NVIDIA GPU"
        return [*findings, Finding(code="TC-123", where="--gpu cpu", message=message, hint=hint)]
    named: set[str] = set()
    parts = tuple(parts)
    for format, kind in parts:
        if kind == "lm_head":
            findings += _head(target, version, gpu, format)
        elif format.name not in named:
            found = list(_format(target, version, gpu, format, kind))
            named |= {format.name} if found else set()
            findings += found
    if kv_cache != "none":
        findings += _kv(target, version, gpu, kv_cache, {format.name for format, _ in parts})
    return findings


def _general(target: Target, version: str) -> Iterator[Finding]:
    wanted, known = parse_version(version), [parse_version(item) for item in target.versions]
    where = f"--target {target.name}"
    if target.refuses:
        yield Finding(code="TC-124", where=where, message=target.refuses, hint=target.deprecated)
    elif target.deprecated:
        yield Finding(code="TC-124", where=where, message=target.deprecated, severity="warning")
    if wanted < known[0]:
        message = f"version {version} is older than the support tables, which begin at {known[0]}"
        yield Finding(code="TC-106", where=where, message=message, hint=f"use {target.default_version}")
    elif wanted > known[-1]:
        message = f"version {version} is newer than the support tables, which end at {known[-1]}"
        hint = "what follows assumes that nothing was removed"
        yield Finding(code="TC-106", where=where, message=message, hint=hint, severity="warning")


def _format(target: Target, version: str, gpu: Gpu, format: Format, model: Model) -> Iterator[Finding]:
    row = target.find(format_name=format.name, sm=gpu.sm, model=model, version=version)
    where = f"--format {format.name}"
    what = "a mixture of experts" if model == "moe" else "a dense model"
    if row is None:
        reason = REASONS.get((format.name, model), "") if target.name == "trtllm" else ""
        message = f"{target.name} {version} does not run {format.name} for {what} on {gpu.name} (SM{gpu.sm})"
        yield Finding(
            code="TC-120",
            where=where,
            message=f"{message}: {reason}" if reason else message,
            hint="; or ".join(alternatives(target, version, gpu, format, model)),
        )
    elif row.state == "limited":
        message = f"{format.name} on {gpu.name} with {target.name} {version}: {row.note}"
        names = [item.name for item in native(target, version, gpu, model)]
        hint = f"native on {gpu.name}: {', '.join(names)}" if names else ""
        yield Finding(code="TC-121", where=where, message=message, hint=hint, severity="warning")


def _head(target: Target, version: str, gpu: Gpu, format: Format) -> Iterator[Finding]:
    row = target.find_head(format_name=format.name, sm=gpu.sm, version=version)
    where, hint = "--lm-head", "leave --lm-head out"
    if row is None:
        message = (
            f"{target.name} {version} does not run an lm_head in {format.name} on {gpu.name} (SM{gpu.sm})"
        )
        yield Finding(code="TC-125", where=where, message=message, hint=hint)
    elif row.state == "limited":
        message = f"lm_head in {format.name} with {target.name} {version}: {row.note}"
        yield Finding(code="TC-125", where=where, message=message, hint=hint, severity="warning")


def check_mixed(target: Target, version: str, family: str, *, is_moe: bool) -> Iterator[Finding]:
    """Whether a checkpoint whose parts have several formats (MIXED_PRECISION) loads; ``is_moe``: with experts in it."""
    state = target.mixes(family, is_moe=is_moe, version=version)
    if state == "yes" or target.mixed is None:
        return
    known = "fails" if state == "no" else "is not known to work"
    yield Finding(
        code="TC-126",
        where=f"--target {target.name}",
        message=f"several formats in one mixture of experts: with {target.name} {version}, {family} {known}: "
        f"{target.mixed.reason} ({target.mixed.source})",
        hint="use one format: --shared-experts and --attention bf16 or same",
        severity="error" if state == "no" else "warning",
    )


def _kv(target: Target, version: str, gpu: Gpu, kv_cache: str, formats: set[str]) -> Iterator[Finding]:
    row = target.find_kv(kv_cache=kv_cache, sm=gpu.sm, model="dense", version=version)
    where = f"--kv-cache {kv_cache}"
    others = [
        name
        for name in KV_CACHES
        if (other := target.find_kv(kv_cache=name, sm=gpu.sm, model="dense", version=version))
        and other.state == "yes"
    ]
    hint = f"use --kv-cache {' or '.join([*others, 'none'])}"
    if row is None:
        message = f"{target.name} {version} has no {kv_cache} KV cache on {gpu.name} (SM{gpu.sm})"
        yield Finding(code="TC-122", where=where, message=message, hint=hint)
    elif row.beside and formats - set(row.beside):
        wrong = " and ".join(sorted(formats - set(row.beside)))
        message = (
            f"{target.name} {version} runs an {kv_cache} KV cache with weights in {' or '.join(row.beside)}, "
            f"not beside {wrong}"
        )
        yield Finding(
            code="TC-122", where=where, message=message, hint=f"{hint}, or --format {row.beside[0]}"
        )
    elif row.state == "limited":
        message = f"{kv_cache} KV cache on {gpu.name} with {target.name} {version}: {row.note}"
        yield Finding(code="TC-122", where=where, message=message, hint=hint, severity="warning")


def check_backend(
    target: Target, version: str, gpu: Gpu, format: Format, wish: Wish
) -> tuple[str, list[Finding]]:
    """(``moe_config.backend`` for these experts, findings). Empty without tables, and for what check_parts refuses."""
    if target.line(version) is None or not gpu.sm:
        return "", []
    try:
        return choose_backend(target, version, gpu.sm, format.name, wish)[0], []
    except UsageError as error:
        if error.code != "TC-129":  # said by check_parts, with more to choose from
            return "", []
        where = "--moe-backend" if wish.backend else f"--format {format.name}"
        return "", [Finding(code="TC-129", where=where, message=str(error), hint=error.hint or "")]


def check_known_bad(target: Target, gpu: Gpu, case: Case) -> Iterator[Finding]:
    """Reports against this very combination."""
    for item in target.known_bad(case.version):
        if item.hits(case):
            yield Finding(
                code="TC-128",
                where=f"--target {target.name}",
                message=f"{item.what} (TensorRT-LLM {case.version}, {case.family} on {gpu.name}): {item.link}",
                hint=f"use {item.instead}",
                severity=item.severity,
            )
