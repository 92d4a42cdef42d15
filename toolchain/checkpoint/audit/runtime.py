"""Rules of one release of TensorRT-LLM: does it read this config, know these algorithms, and cut these shapes.

The facts are in ``toolchain.targets.checkpoint_rules``; where nobody has looked, the finding is a warning that says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.checkpoint.audit.subject import Subject
from toolchain.checkpoint.compressed_config import METHOD
from toolchain.checkpoint.quant_config import FILE, MIXED
from toolchain.core.errors import UsageError
from toolchain.core.files import read_json
from toolchain.core.findings import Finding
from toolchain.core.roles import Role
from toolchain.models.config import config_dtype, text_config
from toolchain.plan.types import Plan
from toolchain.targets import TRTLLM, parse_version
from toolchain.targets import checkpoint_rules as rules
from toolchain.targets.architectures import ALL_SMS
from toolchain.targets.base import Model
from toolchain.targets.checkpoint_rules import Fact

LAYERS_FILE = "quant_cfg.json"
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "w2")
"""Projections whose in_features the ranks of tp share."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The release that a checkpoint is meant for, and over how many ranks."""

    version: str
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        parse_version(self.version)
        if self.tp < 1 or self.ep < 1 or self.tp % self.ep:
            raise UsageError(
                f"tp={self.tp} ep={self.ep}: both at least 1, and tp a multiple of ep expected",
                hint="experts are divided among the ranks of tp",
                code="TC-105",
            )

    @property
    def moe_tp(self) -> int:
        return self.tp // self.ep


def runtime_of(plan: Plan) -> Runtime | None:
    """The release that ``plan`` is for; None where no TensorRT-LLM will load the checkpoint."""
    if plan.target != "trtllm":
        return None
    return Runtime(version=plan.target_version, tp=plan.serving.tp, ep=plan.serving.ep)


def for_runtime(subject: Subject, runtime: Runtime) -> Iterator[Finding]:
    """Everything that keeps ``runtime`` from loading the checkpoint as what it is."""
    yield from _algorithms(subject, runtime)
    yield from _config_shape(subject, runtime)
    yield from _kv_cache(subject, runtime)
    yield from _kernels(subject, runtime)
    yield from _channel_scales(subject)
    yield from _cuts(subject, runtime)


def _verdict(fact: Fact, version: str, code: str, where: str, what: str, hint: str) -> Iterator[Finding]:
    """Nothing when the fact holds, an error when it does not, a warning when nobody knows."""
    state = fact.state(version)
    since = f"known from {fact.since} on" if fact.since else "in no release that was looked at"
    if state == "no":
        message = f"TensorRT-LLM {version} {what} ({since}; {fact.source})"
        yield Finding(code=code, where=where, message=message, hint=hint)
    elif state == "unverified":
        message = (
            f"unverified: not known whether TensorRT-LLM {version} still {what} ({since}; {fact.source})"
        )
        yield Finding(code=code, where=where, message=message, hint=hint, severity="warning")


_ENUM = Fact(never=True, source=rules.MODE)


def _algorithms(subject: Subject, runtime: Runtime) -> Iterator[Finding]:
    """Every quant_algo of the config is a member of the release's enum, written exactly so."""
    quant = subject.quant
    for algo in dict.fromkeys(
        (quant.quant_algo or "", *quant.quantized_layers.values(), *subject.quantized.values())
    ):
        known = rules.ALGO_ALIASES.get(algo, algo)
        fact = rules.QUANT_ALGOS.get(known, _ENUM)
        where = f"quant_algo {algo}"
        hint = "quantize to another format (`toolchain list formats`), or use a later release"
        yield from _verdict(
            fact, runtime.version, "TC-338", where, "does not know this algorithm and raises", hint
        )


def _config_shape(subject: Subject, runtime: Runtime) -> Iterator[Finding]:
    """The release finds the quantization config and understands its shape."""
    quant, version = subject.quant, runtime.version
    where = FILE if (subject.directory / FILE).is_file() else "config.json"
    if quant.shape == METHOD:
        for algo in sorted(set(subject.quantized.values())):
            fact = rules.COMPRESSED.get(algo, Fact(never=True, source=rules.LOADER))
            what = f"does not read compressed-tensors stored as {algo}"
            yield from _verdict(
                fact, version, "TC-339", where, what, "`toolchain convert` writes ModelOpt's layout"
            )
        return
    if quant.shape == "published":
        return
    if where != FILE or quant.shape == "flat":
        what = f"reads no flat config in {where}: the legacy shape in {FILE} is expected"
        yield from _verdict(
            rules.FLAT,
            version,
            "TC-339",
            where,
            what,
            f"write {FILE} in the legacy shape (quantize or export again)",
        )
    if quant.quant_algo == MIXED:
        yield from _layers(subject, version, where)


def _layers(subject: Subject, version: str, where: str) -> Iterator[Finding]:
    """MIXED_PRECISION: quant_cfg.json where old releases want it, and no contradiction with it."""
    path = subject.directory / LAYERS_FILE
    if not path.is_file():
        what = f"reads quantized_layers from {LAYERS_FILE} only, and there is none"
        hint = f"copy the content of `quantization` in {FILE} into {LAYERS_FILE}"
        yield from _verdict(rules.LAYERS_IN_FILE, version, "TC-339", where, what, hint)
        return
    other: Any = read_json(path)
    ours, theirs = subject.quant.kv_cache_quant_algo, other.get("kv_cache_quant_algo")
    if ours and theirs and ours != theirs:
        message = f"kv_cache_quant_algo is {theirs}, {FILE} says {ours}: the loader raises"
        yield Finding(code="TC-323", where=LAYERS_FILE, message=message)
    layers = {
        name: entry.get("quant_algo", "") for name, entry in (other.get("quantized_layers") or {}).items()
    }
    if layers and layers != subject.quant.quantized_layers:
        differ = sorted(
            name
            for name in {**layers, **subject.quant.quantized_layers}
            if layers.get(name) != subject.quant.quantized_layers.get(name)
        )
        message = f"quantized_layers differs from {FILE} for {len(differ)} modules: {differ[:4]}"
        yield Finding(code="TC-323", where=LAYERS_FILE, message=message)


def _kv_cache(subject: Subject, runtime: Runtime) -> Iterator[Finding]:
    quant, algo = subject.quant, subject.quant.kv_cache_quant_algo
    if algo is None:
        return
    if algo not in rules.KV_ALGOS:
        message = f"KV cache {algo} is none of {', '.join(rules.KV_ALGOS)}"
        yield Finding(code="TC-338", where="kv_cache_quant_algo", message=message)
    elif quant.shape == "flat" and algo in rules.FLAT_KV:
        what = f"drops the {algo} cache of a flat config with a warning in its log"
        hint = f"write {FILE} in the legacy shape"
        yield from _verdict(rules.FLAT_KV[algo], runtime.version, "TC-339", "kv_cache_scheme", what, hint)


def _kernels(subject: Subject, runtime: Runtime) -> Iterator[Finding]:
    """Some GPU has kernels for each format in each kind of part with this release."""
    kinds: dict[tuple[str, Model], str] = {}
    for module in subject.quantized:
        found, role = subject.format_of(module), subject.part(module).role
        if found is not None and role is not Role.LM_HEAD:
            model: Model = "moe" if role is Role.ROUTED_EXPERT else "dense"
            kinds.setdefault((found.name, model), module)
    for (name, kind), module in kinds.items():
        if not any(
            TRTLLM.find(format_name=name, sm=sm, model=kind, version=runtime.version) for sm in ALL_SMS
        ):
            what = "experts" if kind == "moe" else "Linears"
            yield Finding(
                code="TC-345",
                where=module,
                message=f"TensorRT-LLM {runtime.version} has no kernel for {what} in {name} on any GPU",
                hint=f"`toolchain support --format {name}` lists what there is",
            )


def _channel_scales(subject: Subject) -> Iterator[Finding]:
    """AWQ: pre_quant_scale where the loader asks for it by name, in the dtype that it wants."""
    dtype = config_dtype(text_config(subject.config))
    for module, algo in subject.quantized.items():
        part, tensors = subject.part(module), subject.modules[module]
        scale = tensors.get("pre_quant_scale")
        where = f"{module}.pre_quant_scale"
        alone = len(subject.family.fused_siblings(part.projection)) == 1
        expert = part.role is Role.ROUTED_EXPERT
        wanted = algo in rules.EXPERTS_NEED_PRE_QUANT_SCALE if expert else alone
        if algo in rules.NEEDS_PRE_QUANT_SCALE and wanted and scale is None:
            yield Finding(
                code="TC-346",
                where=where,
                message="missing; TensorRT-LLM asks for it by name where no norm can take it",
                hint="a tensor of ones does where nothing was scaled",
            )
        if algo in rules.MODEL_DTYPE_PRE_QUANT_SCALE and scale is not None and scale.dtype != dtype:
            yield Finding(code="TC-311", where=where, message=f"dtype {scale.dtype}, the model's is {dtype}")


def _cuts(subject: Subject, runtime: Runtime) -> Iterator[Finding]:
    """Each rank's piece of a row-parallel matrix is whole groups and blocks; one finding per width.

    The columns of gate/up are the same width as the input of down, those of q/k/v as the input of o.
    """
    told: set[tuple[Role, str, int]] = set()
    for module in subject.quantized:
        found, shape, part = subject.format_of(module), subject.weight_shape(module), subject.part(module)
        if found is None or shape is None or part.projection not in ROW_PARALLEL:
            continue
        ranks = runtime.moe_tp if part.role is Role.ROUTED_EXPERT else runtime.tp
        size, multiple = shape[1], max(found.in_multiple, found.group_size or 1)
        key = (part.role, part.projection, size)
        if ranks == 1 or key in told or (size % ranks == 0 and size // ranks % multiple == 0):
            continue
        told.add(key)
        yield Finding(
            code="TC-347",
            where=module,
            message=f"in_features {size} over {ranks} ranks gives {size / ranks:g} each, not a multiple of {multiple}",
            hint="use fewer ranks, or --ep for experts",
        )
