"""2:4 sparsity in a plan: what may be asked for, what it takes, and who gains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from toolchain.core.errors import UsageError
from toolchain.core.findings import Finding
from toolchain.core.gpus import Gpu
from toolchain.core.roles import Role
from toolchain.formats.base import DTYPE_BYTES, Format
from toolchain.models.prequantized import keeps_values
from toolchain.models.types import LinearInfo, ModelInfo
from toolchain.plan.choices import Choices
from toolchain.plan.steps import Sparsity
from toolchain.plan.types import Estimates
from toolchain.recipes import GRAM_BUDGET_BYTES, Recipe
from toolchain.targets.base import PartKind, Target
from toolchain.targets.sparsity import check_sparsity

PATTERN = "2:4"
METHODS = ("magnitude", "sparsegpt")
MULTIPLES = {"magnitude": (8, 16), "sparsegpt": (4, 4)}
"""(out_features, in_features) must be multiples of these, else ModelOpt leaves a matrix dense, and only warns
(``_check_weight_size`` of its searchers)."""


def sparsity_of(pattern: str | None, method: str) -> Sparsity | None:
    """What ``--sparsity`` and ``--sparsity-method`` ask for; None for nothing. UsageError TC-265 for values that do not
    exist."""
    if pattern is None:
        if method != Sparsity.method:
            raise UsageError(
                f"--sparsity-method {method} without --sparsity", hint="add --sparsity 2:4", code="TC-265"
            )
        return None
    if pattern != PATTERN:
        raise UsageError(
            f"--sparsity {pattern}: {PATTERN} is the only pattern that GPUs skip and ModelOpt makes",
            hint=f"use --sparsity {PATTERN}, or leave it out",
            code="TC-265",
        )
    if method not in METHODS:
        raise UsageError(
            f"unknown --sparsity-method {method!r}", hint=f"known: {', '.join(METHODS)}", code="TC-265"
        )
    return Sparsity(pattern=pattern, method=method)


def sparsity_findings(
    info: ModelInfo,
    sparsity: Sparsity | None,
    choices: Choices,
    *,
    recipe: Recipe,
    target: Target,
    version: str,
    gpu: Gpu,
    parts: Iterable[tuple[Format, PartKind]],
) -> Iterator[Finding]:
    """Why the quantized matrices cannot be made sparse, stay sparse, or would be for nothing."""
    if sparsity is None:
        return
    quantized = list(choices.quantized(info))
    yield from check_sparsity(target, version, gpu, parts)
    yield from _recipe(recipe)
    yield from _sizes(sparsity, [linear for linear, _ in quantized])
    yield from _kept_numbers(info, {found.name for _, found in quantized})


def _recipe(recipe: Recipe) -> Iterator[Finding]:
    moving = recipe.on("target")
    if moving is not None:
        yield Finding(
            code="TC-265",
            where=f"--recipe {recipe.name}",
            message=f"{moving} solves the weights again, and zeros become other numbers",
            hint=f"leave {moving} out; gptq keeps zeros, channel and block scales do not touch them",
        )
    if recipe.on("order"):
        yield Finding(
            code="TC-265",
            where=f"--recipe {recipe.name}",
            message="arrange puts channels into another order, and two zeros of four neighbours are no longer there",
            hint="leave arrange out; gptq keeps zeros, channel and block scales do not touch them",
        )


def _sizes(sparsity: Sparsity, linears: list[LinearInfo]) -> Iterator[Finding]:
    rows, columns = MULTIPLES[sparsity.method]
    odd: dict[tuple[Role, str, int, int], int] = {}
    for linear in linears:
        if linear.out_features % rows or linear.in_features % columns:
            part = linear.part
            key = (part.role, part.projection, linear.out_features, linear.in_features)
            odd[key] = odd.get(key, 0) + 1
    for (role, projection, out_features, in_features), count in odd.items():
        yield Finding(
            code="TC-265",
            where=f"{role.value} {projection}".strip(),
            message=f"{count} matrices of {out_features} x {in_features}: {sparsity.method} takes multiples of {rows} "
            f"x {columns} (out x in), and ModelOpt leaves others dense",
            hint="leave this part in the source dtype, or leave --sparsity out",
        )


def _kept_numbers(info: ModelInfo, formats: set[str]) -> Iterator[Finding]:
    if info.scheme is None:
        return
    kept = sorted(name for name in formats if keeps_values(info.scheme, name))
    if kept:
        yield Finding(
            code="TC-265",
            where=info.source,
            message=f"holds {info.scheme.method} numbers that become {', '.join(kept)} as they are: nothing is chosen "
            f"anew, so nothing becomes zero",
            hint="start from a BF16 release, or leave --sparsity out",
        )


def needs_data(sparsity: Sparsity | None) -> bool:
    """True when the choice of zeros looks at inputs."""
    return sparsity is not None and sparsity.method == "sparsegpt"


def with_sparsity(
    estimates: Estimates, info: ModelInfo, sparsity: Sparsity | None, choices: Choices
) -> Estimates:
    """``estimates`` with what choosing zeros takes. Sizes stay: zeros are stored like every other number."""
    if sparsity is None:
        return estimates
    basis = f"{estimates.basis}; {sparsity.pattern} sparsity: zeros are stored and loaded like other numbers"
    if not needs_data(sparsity):
        return replace(estimates, basis=basis)
    held = _hessian_bytes(info, choices)
    return replace(
        estimates,
        basis=f"{basis}; SparseGPT: [in, in] float32 of a layer's matrices, and the model in memory",
        quantize_memory_bytes=estimates.quantize_memory_bytes + held,
        stream_way="",
        stream_memory_bytes=0,
        stream_disk_bytes=0,
    )


def _hessian_bytes(info: ModelInfo, choices: Choices) -> int:
    """Of the matrices that are looked at together."""
    layers: dict[int | None, int] = {}
    for linear, _ in choices.quantized(info):
        layer = linear.part.layer
        layers[layer] = layers.get(layer, 0) + DTYPE_BYTES["F32"] * linear.in_features**2
    return min(GRAM_BUDGET_BYTES, max(layers.values(), default=0))


__all__ = ["METHODS", "PATTERN", "needs_data", "sparsity_findings", "sparsity_of", "with_sparsity"]
