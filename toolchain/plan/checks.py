"""Every violation of a plan at once."""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.core.findings import Finding
from toolchain.core.gpus import Gpu
from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.families import is_generic
from toolchain.families.fused import MXFP4
from toolchain.formats.base import Format
from toolchain.formats.kv import get_kv_cache
from toolchain.models.prequantized import keeps_values
from toolchain.models.types import ModelInfo
from toolchain.plan.assign import KV_PROJECTION
from toolchain.plan.backends import backend_findings
from toolchain.plan.choices import Choices
from toolchain.plan.dimensions import format_findings, rank_findings
from toolchain.plan.legacy import legacy_findings
from toolchain.plan.memory import kv_bytes_per_token
from toolchain.plan.parallel import parallel_findings, serving_findings
from toolchain.plan.types import Estimates, Serving
from toolchain.recipes import Recipe
from toolchain.targets.base import PartKind, Target
from toolchain.targets.support import check_mixed, check_parts

GIB = 1024**3


def model_findings(info: ModelInfo) -> Iterator[Finding]:
    """What speaks against quantizing this source at all."""
    quantization = info.quantization
    if quantization and info.scheme is None:
        method = quantization.get("quant_method") or quantization.get("quant_algo") or "an unnamed method"
        message = f"{info.source} is already quantized ({method}), and is not one of the layouts that are dequantized"
        hint = "start from the BF16 release of the model; fp8 with weight_block_size and mxfp4 are read"
        yield Finding(code="TC-141", where=info.source, message=message, hint=hint)
    if is_generic(info.family):
        message = (
            f"{info.architecture} is not a declared family: its parts were recognised by their usual names"
        )
        hint = "check the assignments, and declare the family in toolchain/families"
        yield Finding(code="TC-143", where=info.source, message=message, hint=hint, severity="warning")
    if not info.has_weights:
        message = "planned from config.json alone: there are no weights to quantize here"
        hint = "fetch the safetensors files before quantizing"
        yield Finding(code="TC-144", where=info.source, message=message, hint=hint, severity="warning")


def storage_findings(info: ModelInfo, choices: Choices, target: Target) -> Iterator[Finding]:
    """Whether the family's way of storing experts has a place for their format, and the target a loader for it."""
    for format in dict.fromkeys(choices.format_of(item) for item in info.by_role(Role.ROUTED_EXPERT)):
        reason = info.family.refusal(format.name, target.name) if format else ""
        if format is None or not reason:
            continue
        fitting = [name for name in info.family.formats or () if not info.family.refusal(name, target.name)]
        message = (
            f"experts of {info.family.name} cannot be stored as {format.name} for {target.name}: {reason}"
        )
        hint = f"use --format {' or '.join(fitting)}"
        yield Finding(code="TC-140", where="--format", message=message, hint=hint)


def published_findings(info: ModelInfo, choices: Choices, kv_cache: str) -> Iterator[Finding]:
    """MXFP4 experts in fused storage are written as gpt-oss was published, whose config has words for nothing else."""
    experts = {choices.format_of(item) for item in info.by_role(Role.ROUTED_EXPERT)}
    if not info.family.fuses_experts or MXFP4 not in {found.name for found in experts if found}:
        return
    if info.family.refusal(MXFP4):  # said by storage_findings: there is no published layout to speak of
        return
    others = {linear.part.role.value for linear, _ in choices.quantized(info)} - {Role.ROUTED_EXPERT.value}
    asked = [
        *sorted(others),
        *(["experts in several formats, or not in all layers"] if len(experts) > 1 else []),
    ]
    asked += [f"KV cache {kv_cache}"] if kv_cache != "none" else []
    if asked:
        message = (
            f"{info.family.name} in MXFP4 is written in its published layout, which knows quantized experts only "
            f"(asked for besides: {', '.join(asked)})"
        )
        hint = "use --policy experts-only --kv-cache none; runtimes have options of their own for the cache"
        yield Finding(code="TC-140", where="--policy", message=message, hint=hint)


def dequantized_findings(info: ModelInfo, choices: Choices) -> Iterator[Finding]:
    """What of a quantized source is rounded again, or written larger than it was."""
    if info.scheme is None:
        return
    parts = [item for item in info.linears if item.part.role in QUANTIZABLE]
    if info.scheme.method == MXFP4:
        parts = [item for item in parts if item.part.role is Role.ROUTED_EXPERT]
    formats = {found.name if (found := choices.format_of(item)) else None for item in parts}
    again = sorted(name for name in formats if name and not keeps_values(info.scheme, name))
    said = []
    if again:
        said.append(f"rounded again for {', '.join(again)}")
    if None in formats:
        said.append("written as BF16 where the plan keeps the dtype")
    if said:
        message = (
            f"the source holds {info.scheme.method} numbers: they are dequantized, and {' and '.join(said)}"
        )
        hint = "start from a BF16 release if there is one, or use a format that holds these numbers"
        yield Finding(code="TC-145", where=info.source, message=message, hint=hint, severity="warning")


def recipe_findings(info: ModelInfo, recipe: Recipe, choices: Choices) -> Iterator[Finding]:
    """Whether fused experts have a place for what the recipe adds: a channel scale per expert has none."""
    transform = recipe.on("transform")
    experts = {found for item in info.by_role(Role.ROUTED_EXPERT) if (found := choices.format_of(item))}
    if any(info.family.refusal(found.name) for found in experts):
        return  # said by storage_findings, and the recipe may be nothing but what the format's name promises
    if transform and info.family.fuses_experts and experts:
        message = (
            f"recipe {transform} gives each expert a pre_quant_scale, and experts of {info.family.name}, stored in one "
            f"tensor per layer, have no place for it"
        )
        yield Finding(code="TC-140", where="--recipe", message=message, hint="leave it out of --recipe")


def kv_findings(info: ModelInfo, kv_cache: str) -> Iterator[Finding]:
    """Whether every layer has a place for the scales of a quantized KV cache."""
    if kv_cache == "none":
        return
    layers = {part.layer for linear in info.linears if (part := linear.part).projection == KV_PROJECTION}
    missing = info.num_hidden_layers - len(layers)
    if missing:
        why = f"and a checkpoint has no place for the scales of an {kv_cache} cache"
        if not get_kv_cache(kv_cache).calibrated:
            why = f"and what an {kv_cache} cache makes of them is neither measured nor emulated here"
        message = (
            f"{missing} of {info.num_hidden_layers} layers have no k_proj and v_proj (MLA or linear attention): what "
            f"they cache are not keys and values, {why}"
        )
        yield Finding(code="TC-116", where="--kv-cache", message=message, hint="use --kv-cache none")
    multiple = get_kv_cache(kv_cache).head_dim_multiple
    if info.attention.head_dim % multiple:
        message = (
            f"head_dim {info.attention.head_dim} is not a multiple of {multiple}, the block of {kv_cache}"
        )
        yield Finding(code="TC-116", where="--kv-cache", message=message, hint="use --kv-cache fp8")


def request_findings(
    info: ModelInfo,
    *,
    choices: Choices,
    format: Format,
    kv_cache: str,
    gpu: Gpu,
    target: Target,
    version: str,
    serving: Serving,
) -> list[Finding]:
    """Every finding that needs neither the policy nor the estimates. ``format`` is the main one of the plan."""
    limits = list(serving_findings(serving))
    if limits:
        return [*model_findings(info), *limits]
    parts = parts_of(info, choices, format)
    return [
        *model_findings(info),
        *storage_findings(info, choices, target),
        *published_findings(info, choices, kv_cache),
        *dequantized_findings(info, choices),
        *format_findings(info, choices),
        *rank_findings(info, choices, serving),
        *parallel_findings(info, target, serving),
        *kv_findings(info, kv_cache),
        *check_parts(target, version, gpu, parts, kv_cache),
        *backend_findings(info, parts=parts, target=target, version=version, gpu=gpu, serving=serving),
        *mixed_findings(info, choices, target, version),
        *legacy_findings(info, choices, target, serving),
    ]


def mixed_findings(info: ModelInfo, choices: Choices, target: Target, version: str) -> Iterator[Finding]:
    """Whether the target loads several formats in one checkpoint of this family."""
    experts = any(choices.format_of(item) for item in info.by_role(Role.ROUTED_EXPERT))
    if len({found for _, found in choices.quantized(info)}) > 1:
        yield from check_mixed(target, version, info.family.name, is_moe=experts)


def parts_of(info: ModelInfo, choices: Choices, format: Format) -> tuple[tuple[Format, PartKind], ...]:
    """(format, kind of part) pairs that a target must run, the largest part first; the main format when none is."""
    sizes: dict[tuple[Format, PartKind], int] = {}
    for linear, found in choices.quantized(info):
        kinds: dict[Role, PartKind] = {Role.ROUTED_EXPERT: "moe", Role.LM_HEAD: "lm_head"}
        key = (found, kinds.get(linear.part.role, "dense"))
        sizes[key] = sizes.get(key, 0) + linear.parameters
    return tuple(sorted(sizes, key=lambda key: -sizes[key])) or ((format, "dense"),)


def memory_findings(
    info: ModelInfo,
    choices: Choices,
    estimates: Estimates,
    *,
    kv_cache: str,
    gpu: Gpu,
    target: Target,
    serving: Serving,
) -> Iterator[Finding]:
    """Whether the fullest rank fits its GPU. Nothing is said about a CPU."""
    total = estimates.gpu_memory_bytes
    if not total:
        return
    fixed = estimates.weights_per_gpu_bytes + estimates.activations_per_gpu_bytes
    where = f"--gpu {gpu.name}"
    if fixed > total:
        message = (
            f"weights {estimates.weights_per_gpu_bytes / GIB:.1f} GiB + activations "
            f"{estimates.activations_per_gpu_bytes / GIB:.1f} GiB per GPU exceed {total / GIB:.1f} GiB"
        )
        more = f"more GPUs ({_wider(serving)}), a smaller format, or " if target.parallel else ""
        hint = f"use {more}a larger GPU"
        yield Finding(code="TC-130", where=where, message=message, hint=hint)
        return
    room = int((total - fixed) * serving.kv_fraction)
    if estimates.kv_cache_per_gpu_bytes > room:
        tokens = int(room / kv_bytes_per_token(info, kv_cache, serving, per_head=target.emulates))
        message = (
            f"the KV cache of {serving.max_batch_size} requests of {serving.max_seq_len} tokens needs "
            f"{estimates.kv_cache_per_gpu_bytes / GIB:.1f} GiB per GPU; {room / GIB:.1f} GiB are left for it "
            f"({serving.kv_fraction:.0%} of what weights and activations leave)"
        )
        quantized, mla = get_kv_cache(kv_cache).quant_algo, info.config.get("kv_lora_rank")
        # MLA's cache has no smaller form, and some published layouts have no words for one.
        refused = any(published_findings(info, choices, "fp8"))
        hint = _kv_hint(tokens, target, serving, gpu, smaller=not (quantized or mla or refused))
        yield Finding(code="TC-130", where=where, message=message, hint=hint)


def _wider(serving: Serving) -> str:
    """Twice the ranks; experts go along where every rank has whole ones."""
    return f"--tp {serving.tp * 2}" + (f" --ep {serving.ep * 2}" if serving.ep == serving.tp > 1 else "")


def _kv_hint(tokens: int, target: Target, serving: Serving, gpu: Gpu, *, smaller: bool) -> str:
    """``smaller``: whether a cache of fewer bits is possible."""
    choices = []
    if tokens >= serving.max_seq_len:
        choices.append(f"--max-batch-size {tokens // serving.max_seq_len}")
    if tokens >= serving.max_batch_size:
        choices.append(f"--max-seq-len {tokens // serving.max_batch_size}")
    if smaller and target.keeps_kv("fp8", gpu.sm):
        choices.append("--kv-cache fp8")
    # Under attention data parallelism every rank keeps the cache of its own requests whole.
    if target.parallel and not serving.attention_dp:
        choices.append(_wider(serving))
    return f"use {' or '.join(choices)}"
