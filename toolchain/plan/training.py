"""Whether a plan can be trained as asked, what that takes, and every value that it leaves open. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from toolchain.core.findings import Finding
from toolchain.core.roles import Role
from toolchain.formats import FORMATS, get_format
from toolchain.formats.base import same_stored
from toolchain.models.prequantized import keeps_values
from toolchain.models.types import LinearInfo, ModelInfo
from toolchain.plan.steps import Training
from toolchain.plan.training_memory import (
    BASIS,
    adaptable_linears,
    fitting,
    gib,
    has_teacher,
    sizes_of,
    training_disk,
    training_memory,
)
from toolchain.plan.types import SOURCE_DTYPE, Plan
from toolchain.recipes import INGREDIENTS, get_recipe

METHODS, PRECISIONS, PARALLEL = ("qad", "qat"), ("bf16", "fp32"), ("ddp", "fsdp2")
FIXED_AXES = ("target", "scales", "rounding")
"""What an ingredient decides after calibration. Training goes on from there where block scales are learned; scales that
follow the weights would change it again."""
TRAINABLE_ROLES = tuple(role.value for role in Role if role is not Role.OTHER)
LEAST = {
    "lora_rank": 0, "length_tokens": 2, "batch_size": 1, "accumulate": 1, "steps": 0, "evaluate_every": 1,
    "patience": 0, "keep_checkpoints": 1, "held_out_tokens": 2, "devices": 1, "seed": 0,
    "weight_decay": 0, "lora_alpha": 0, "router_weight": 0,
}  # fmt: skip
ABOVE = ("learning_rate", "temperature", "max_grad_norm", "epochs")
OPTIONS = {"length_tokens": "--length", "roles": "--train"}
"""Fields whose option has another name."""


def plan_training(
    plan: Plan,
    info: ModelInfo,
    training: Training,
    *,
    memory_bytes: int = 0,
    on_host: bool = False,
    where: str = "",
    teacher_bytes: int | None = None,
) -> Plan:
    """``plan`` with ``training``, its roles resolved, its memory estimated, and all that speaks against it in findings.

    ``memory_bytes``: of one device, or of the machine whose devices share it (``on_host``); 0: not known, nothing is
    said. ``where`` names it. ``teacher_bytes``: of a teacher other than the model itself.
    """
    quantized = [item for item in info.linears if plan.format_of(info.family, item.name) != SOURCE_DTYPE]
    roles = training.roles or tuple(sorted({item.part.role.value for item in quantized}))
    training = replace(training, roles=roles)
    findings = list(_value_findings(training, info))
    takes: dict[str, int] = {}
    disk = 0
    if not findings:
        findings = [
            *_role_findings(info, training),
            *_format_findings(plan, info, training, quantized),
        ]
        sizes = sizes_of(info, quantized, roles, teacher_bytes)
        takes = training_memory(sizes, training, on_host=on_host)
        disk = training_disk(sizes, training, info.bytes)
        needed = sum(takes.values()) * (training.devices if on_host else 1)
        if memory_bytes and needed > memory_bytes and not findings:
            ways = fitting(sizes, training, memory_bytes, on_host=on_host)
            findings.append(_too_large(takes, training, needed, memory_bytes, where, ways))
    figures = replace(
        plan.estimates,
        training_memory_bytes=sum(takes.values()),
        training_memory=takes,
        training_disk_bytes=disk,
        basis="; ".join([plan.estimates.basis, BASIS]),
    )
    return replace(plan, training=training, estimates=figures, findings=(*plan.findings, *findings))


def option_of(name: str) -> str:
    """The option of the command line that sets a field of ``Training``."""
    return OPTIONS.get(name, f"--{name.replace('_', '-')}")


def _error(code: str, where: str, message: str, hint: str) -> Finding:
    return Finding(code=code, where=where, message=message, hint=hint)


def _value_findings(training: Training, info: ModelInfo) -> Iterator[Finding]:
    """TC-196: values that mean nothing, or contradict each other."""
    for name, known in (("method", METHODS), ("precision", PRECISIONS), ("parallel", PARALLEL)):
        if getattr(training, name) not in known:
            said = f"unknown {getattr(training, name)!r}"
            yield _error("TC-196", option_of(name), said, f"one of {', '.join(known)}")
    for name, least in LEAST.items():
        if getattr(training, name) < least:
            said = f"{getattr(training, name)} is too small"
            yield _error("TC-196", option_of(name), said, f"{least} is the least")
    for name in ABOVE:
        if not 0 < getattr(training, name) < float("inf"):
            said = f"{getattr(training, name)} is no positive number"
            yield _error("TC-196", option_of(name), said, "give a number above 0")
    for name, most in (("held_out_share", 0.5), ("warmup", 1.0)):
        value = getattr(training, name)
        if not 0 <= value <= most or (name == "held_out_share" and not value):
            said = f"{value} is not a share between 0 and {most:g}"
            yield _error("TC-196", option_of(name), said, "such as 0.05")
    if training.learning_rate > 1:
        yield _error("TC-196", "--learning-rate", f"{training.learning_rate} is above 1", "such as 1e-5")
    if not training.data:
        yield _error("TC-192", "--data", "there is no training data", "give a text or JSONL file")
    if training.length_tokens > info.max_position_embeddings:
        message = (
            f"{training.length_tokens} tokens, the model has positions for {info.max_position_embeddings}"
        )
        yield _error("TC-196", "--length", message, f"use --length {info.max_position_embeddings}")
    yield from _contradictions(training)


def _contradictions(training: Training) -> Iterator[Finding]:
    if training.method == "qat" and training.teacher:
        message = "--method qat learns from the text alone"
        yield _error("TC-196", "--teacher", message, "use --method qad, or leave --teacher out")
    if training.method == "qat" and training.temperature != 1:
        yield _error("TC-196", "--temperature", "--method qat has no softmax of a teacher", "leave it out")
    if training.method == "qat" and training.router_weight:
        message = "--method qat has no routers of a teacher to follow"
        yield _error("TC-196", "--router-weight", message, "use --method qad, or leave it out")
    if training.lora_alpha and not training.lora_rank:
        yield _error(
            "TC-196", "--lora-alpha", "there are no adapters to scale", "add --lora, or leave it out"
        )
    if training.parallel == "fsdp2" and training.devices == 1:
        message = "one device has nothing to be cut over"
        yield _error("TC-196", "--parallel", message, "give --devices N, or leave it out")


def _role_findings(info: ModelInfo, training: Training) -> Iterator[Finding]:
    """Whether what is to be trained exists, and adapters have a place there."""
    there = {info.part(tensor.name).role.value for tensor in info.tensors} - {Role.OTHER.value}
    unknown = [role for role in training.roles if role not in TRAINABLE_ROLES]
    if training.router_weight and Role.ROUTER.value not in there:
        yield _error("TC-196", "--router-weight", "the model has no routers", "leave it out")
    absent = [role for role in training.roles if role in TRAINABLE_ROLES and role not in there]
    if unknown or absent:
        message = "; ".join(
            [
                *([f"unknown roles {', '.join(unknown)}"] if unknown else []),
                *([f"the model has no {', '.join(absent)}"] if absent else []),
            ]
        )
        yield _error("TC-196", "--train", message, f"of this model: {', '.join(sorted(there))}")
        return
    if not training.lora_rank:
        return
    matrices = adaptable_linears(info)
    adaptable = {item.part.role.value for item in matrices}
    odd = sorted(set(training.roles) - adaptable)
    if odd:
        message = f"{', '.join(odd)} with --lora: adapters go on matrices, those of routers excepted"
        hint = f"train {', '.join(sorted(adaptable))}, or all of the weights without --lora"
        yield _error("TC-196", "--train", message, hint)
        return
    adapted = [item for item in matrices if item.part.role.value in training.roles]
    least = min(adapted, key=lambda item: min(item.out_features, item.in_features), default=None)
    if least is not None and training.lora_rank > min(least.out_features, least.in_features):
        shape = f"[{least.out_features}, {least.in_features}]"
        message = f"{training.lora_rank} is above the rank that {least.name} {shape} can have"
        yield _error("TC-196", "--lora-rank", message, "16 is common; 64 is large")


def _format_findings(
    plan: Plan, info: ModelInfo, training: Training, quantized: list[LinearInfo]
) -> Iterator[Finding]:
    """TC-191: what of the format, the recipe and the source cannot follow trained weights."""
    if not quantized:
        yield _error("TC-191", "--policy", "nothing of the model is quantized", "choose another policy")
    packed = [name for name in plan.formats if info.scheme and keeps_values(info.scheme, name)]
    if info.scheme and packed:
        message = f"its {info.scheme.method} numbers become {', '.join(packed)} as they are: nothing of them is trained"
        yield _error("TC-191", info.source, message, "start from the BF16 release, or use another --format")
    recipe = get_recipe(plan.recipe, get_format(plan.format))
    whole = {item.part.role.value for item in quantized} <= set(training.roles)
    following = [
        name
        for name in plan.formats
        if not (training.learned_scales and whole and get_format(name).learned_scales)
    ]
    fixed = sorted(
        {
            item.name
            for name in following
            for item in recipe.for_format(name).ingredients
            if item.axis in FIXED_AXES
        }
    )
    if fixed:
        message = f"{', '.join(fixed)} (recipe {plan.recipe}): what is chosen after calibration, training would undo"
        hint = (
            f"`toolchain qat {plan.model} --format {plan.format} --data ...` with {trainable_instead(plan)}"
        )
        yield _error("TC-191", "--recipe", message, hint)
    if training.learned_scales and not any(get_format(name).learned_scales for name in plan.formats):
        known = ", ".join(item.name for item in FORMATS if item.learned_scales)
        message = f"{', '.join(plan.formats) or 'no format'}: its scales are not learned (ModelOpt's LSQ)"
        yield _error("TC-191", "--learned-scales", message, f"leave it out, or use a format of: {known}")


def trainable_instead(plan: Plan) -> str:
    """Options with which the same stored layout can be trained."""
    chosen = get_format(plan.format)
    axes = {item.name: item.axis for item in INGREDIENTS}
    kept = [name for name in plan.recipe.split("+") if axes.get(name, "") not in (*FIXED_AXES, "")]
    default = get_recipe(None, chosen)
    alike = [item.name for item in FORMATS if same_stored(item, chosen) and item.name != chosen.name]
    if any(item.axis in FIXED_AXES for item in default.ingredients):
        found = " or ".join([*(f"--format {name}" for name in alike[:1]), "--recipe max"])
    else:
        found = f"--recipe {'+'.join(kept) or default.name}"
    if all(get_format(name).learned_scales for name in plan.formats):
        found += "; or with --learned-scales and all quantized roles, from what the recipe chose"
    return found


def _too_large(
    takes: dict[str, int], training: Training, needed: int, room: int, where: str, ways: list[str]
) -> Finding:
    parts = ", ".join(
        f"{name} {gib(size)}" for name, size in sorted(takes.items(), key=lambda item: -item[1])
    )
    message = f"training takes {gib(needed)} of the {gib(room)} that are there: {parts}" + (
        f", on each of {training.devices} devices" if training.devices > 1 else ""
    )
    hint = (
        f"use {' or '.join(ways)}" if ways else "no option makes it fit: use a larger GPU or a smaller model"
    )
    if has_teacher(training) and not ways:
        hint += "; --method qat --patience 0 needs no teacher"
    return _error("TC-190", where, message, hint)
