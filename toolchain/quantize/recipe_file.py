"""ModelOpt recipe files, accepted as they are: patterns -> overrides of the plan, algorithm -> ingredients.

Only the translation happens here. What comes out is planned, checked against the same hard rules and exported like any
other policy.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.findings import Finding
from toolchain.core.roles import ASSIGNABLE, QUANTIZABLE, Role
from toolchain.formats import FORMATS, KV_CACHES, Format
from toolchain.models.types import LinearInfo, ModelInfo
from toolchain.plan.choices import Override
from toolchain.plan.planner import PlanRefused
from toolchain.plan.types import SOURCE_DTYPE
from toolchain.quantize.recipe_algorithm import ingredients, pinned_inputs
from toolchain.quantize.recipe_patterns import (
    EMBEDDING,
    Patterns,
    Setting,
    asks_four_over_six,
    describe,
    known_formats,
    known_kv_caches,
    read_patterns,
    signature,
)
from toolchain.recipes import INGREDIENTS

QUANTIZERS = ("weight_quantizer", "input_quantizer")
OTHERS = ("output_quantizer", "q_bmm_quantizer", "p_bmm_quantizer", "softmax_quantizer")
"""Quantizers of ModelOpt that no format here has a place for."""


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """What a recipe asks of one model, in the terms of a plan."""

    format: str
    """The format of most parameters, of those that the recipe's algorithm is for."""
    overrides: tuple[Override, ...]
    """One for every part that a plan may quantize: nothing is left to a policy."""
    kv_cache: str
    recipe: str
    """Ingredients joined by ``+``; ``max`` for none."""


def read_recipe_file(text: str, info: ModelInfo) -> RecipeFile:
    """``text``: a path, or a name in ``modelopt_recipes``.

    UsageError TC-159 when it is no PTQ recipe or its algorithm is not available; PlanRefused with every quantizer
    setting that is no format, and every expert that is treated differently from its neighbours.
    """
    quantize = _load(text)
    patterns = read_patterns(quantize.quant_cfg)
    reader = _Reader(text, patterns, info, _names(quantize, patterns, info))
    overrides = tuple(reader.overrides())
    kv_cache = reader.kv_cache()
    if reader.findings:
        raise PlanRefused(
            f"recipe {text} cannot be applied to {info.source} as it is: {len(reader.findings)} problems",
            reader.findings,
            hint="each finding names the pattern or the settings",
            code="TC-159",
        )
    main = reader.main_format()
    return RecipeFile(
        format=main.name, overrides=overrides, kv_cache=kv_cache, recipe="+".join(reader.names) or "max"
    )


def _load(text: str) -> Any:
    from modelopt.recipe import load_recipe
    from modelopt.recipe.config import ModelOptAutoQuantizeRecipe, ModelOptPTQRecipe

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints; stdout is for data
            found = load_recipe(text)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UsageError(
            f"{text} is not a recipe that ModelOpt reads: {error}",
            hint="give a YAML file with `metadata` and `quantize`, or a name such as "
            "general/ptq/nvfp4_experts_only-kv_fp8_cast; ingredients: `toolchain list recipes`",
            code="TC-159",
        ) from error
    if isinstance(found, ModelOptPTQRecipe):
        return found.quantize
    kind = found.recipe_type.value
    if isinstance(found, ModelOptAutoQuantizeRecipe):
        bits = found.auto_quantize.constraints.effective_bits
        hint = f"`toolchain quantize MODEL --bits {bits}` searches formats under that budget"
    else:
        hint = "it trains a draft model; quantization takes recipes of type ptq"
    raise UsageError(f"recipe {text} is of type {kind}, expected ptq", hint=hint, code="TC-159")


def _names(quantize: Any, patterns: Patterns, info: ModelInfo) -> tuple[str, ...]:
    paths = [info.family.to_module(linear.name) for linear in info.linears]
    flagged = any(asks_four_over_six(patterns.of(path, "weight_quantizer")) for path in paths)
    pinned = pinned_inputs([patterns.of(path, "input_quantizer") for path in paths])
    algorithm = quantize.algorithm
    plain = algorithm.model_dump(exclude_unset=True) if hasattr(algorithm, "model_dump") else algorithm
    return (*ingredients(plain, four_over_six=flagged), *pinned)


class _Reader:
    """One recipe applied to the names of one model."""

    def __init__(self, text: str, patterns: Patterns, info: ModelInfo, names: tuple[str, ...]) -> None:
        self.text, self.patterns, self.info, self.names = text, patterns, info, names
        self.findings: list[Finding] = []
        self._sizes: dict[Format, int] = defaultdict(int)
        self._unknown: dict[tuple[str, str], list[str]] = defaultdict(list)

    def overrides(self) -> Iterator[Override]:
        parts: dict[tuple[Role, int | None], dict[str, dict[tuple[str, str], str]]] = defaultdict(dict)
        for linear in self.info.linears:
            name, pattern = self._format_of(linear)
            layer = linear.part.layer if linear.part.role in QUANTIZABLE else None
            found = parts[linear.part.role, layer].setdefault(linear.part.projection, {})
            found.setdefault((name, pattern), linear.name)
        for (role, layer), projections in parts.items():
            yield from self._of_part(role, layer, projections)
        yield from self._embeddings()
        for (where, message), members in self._unknown.items():
            hint = f"formats: {', '.join(item.name for item in FORMATS)} (`toolchain list formats`)"
            text = f"{message} ({len(members)} modules, such as {members[0]}): no format has these settings"
            self.findings.append(Finding(code="TC-159", where=where, message=text, hint=hint))

    def _of_part(
        self, role: Role, layer: int | None, projections: dict[str, dict[tuple[str, str], str]]
    ) -> Iterator[Override]:
        """One override per format and pattern; projections are named only where they differ."""
        alike: dict[tuple[str, str], list[str]] = defaultdict(list)
        for projection, found in projections.items():
            if len({name for name, _ in found}) > 1:
                listed = "; ".join(f"{where} {name} by {pattern}" for (name, pattern), where in found.items())
                self.findings.append(
                    Finding(
                        code="TC-153",
                        where=f"{role.value} of layer {layer}, {projection}",
                        message=f"the recipe treats modules of one kernel differently: {listed}",
                        hint="give all experts of a layer one format",
                    )
                )
            alike[next(iter(found))].append(projection)
        whole = len({name for name, _ in alike}) == 1
        for (name, pattern), members in alike.items():
            if role in ASSIGNABLE or name != SOURCE_DTYPE:
                yield Override(
                    role=role,
                    layer=layer,
                    projections=() if whole else tuple(members),
                    format=name,
                    source=self._where(pattern),
                )
            if whole:
                return

    def _embeddings(self) -> Iterator[Override]:
        """ModelOpt quantizes embeddings too, unless told not to."""
        for tensor in self.info.tensors:
            part = self.info.part(tensor.name)
            if part.role is Role.EMBEDDING:
                path = self.info.family.to_module(tensor.name.removesuffix(".weight"))
                setting = self.patterns.of(path, "weight_quantizer", EMBEDDING)
                if setting.enabled:
                    where = self._where(setting.pattern)
                    yield Override(role=part.role, layer=None, format="a format", source=where)

    def _format_of(self, linear: LinearInfo) -> tuple[str, str]:
        """(format name or ``source``, pattern) of one matrix; unknown settings are collected, and count as kept."""
        path = self.info.family.to_module(linear.name)
        weight, inputs = (self.patterns.of(path, name) for name in QUANTIZERS)
        key = (signature(weight, weights=True), signature(inputs, weights=False))
        output = self.patterns.of(path, "output_quantizer")
        pattern = weight.pattern or inputs.pattern
        if key == ("", "") and not output.enabled:
            return SOURCE_DTYPE, pattern
        fitting = known_formats().get(key, ())
        if not fitting or output.enabled:
            settings: list[tuple[str, Setting]] = [*zip(QUANTIZERS, (weight, inputs), strict=True)]
            settings += [("output_quantizer", output)] if output.enabled else []
            self._unknown[self._where(pattern), describe(settings)].append(path)
            return SOURCE_DTYPE, pattern
        chosen = next((item for item in fitting if item.default_recipe in self.names), fitting[0])
        if linear.part.role in ASSIGNABLE:
            self._sizes[chosen] += linear.parameters
        return chosen.name, pattern

    def main_format(self) -> Format:
        """The largest that every ingredient is for; else the largest. PlanRefused when one ingredient is for none."""
        usable = {item.name: item.formats for item in INGREDIENTS}
        by_size = sorted(self._sizes, key=lambda item: -self._sizes[item])
        if not by_size:
            raise UsageError(
                f"recipe {self.text} quantizes nothing in {self.info.source}",
                hint="its patterns fit none of the model's module names",
                code="TC-159",
            )
        for name in self.names:
            if not any(item.name in usable.get(name, ()) for item in by_size):
                raise UsageError(
                    f"recipe {self.text} chooses by {name}, which is for none of its formats: "
                    f"{', '.join(item.name for item in by_size)}",
                    hint=f"{name} is for {', '.join(usable.get(name, ())) or 'no format here'}",
                    code="TC-159",
                )
        fitting = [item for item in by_size if all(item.name in usable[name] for name in self.names)]
        return (fitting or by_size)[0]

    def kv_cache(self) -> str:
        """The KV cache that all attention layers get; ``none`` when it keeps its dtype."""
        parents = {
            self.info.family.to_module(linear.name).rpartition(".")[0]
            for linear in self.info.by_role(Role.ATTENTION)
        }
        found: dict[str, Setting] = {}
        for parent in sorted(parents):
            for name in ("k_bmm_quantizer", "v_bmm_quantizer"):
                setting = self.patterns.of(parent, name)
                found[signature(setting, weights=False)] = setting
            for name in OTHERS[1:]:
                setting = self.patterns.of(parent, name)
                if setting.enabled and setting.pattern not in ("", "*"):
                    self._refuse_kv(name, setting, "attention here computes on keys and values only")
        names = {known_kv_caches().get(key) for key in found}
        if None in names or len(names) > 1:
            for setting in found.values():
                known = f"KV caches: {', '.join(KV_CACHES)}, one for all layers"
                self._refuse_kv("k_bmm_quantizer and v_bmm_quantizer", setting, known)
            return "none"
        return str(names.pop()) if names else "none"

    def _refuse_kv(self, name: str, setting: Setting, hint: str) -> None:
        message = f"{describe([(name, setting)])}: no KV cache format has these settings"
        finding = Finding(code="TC-159", where=self._where(setting.pattern), message=message, hint=hint)
        if finding not in self.findings:
            self.findings.append(finding)

    def _where(self, pattern: str) -> str:
        return f"recipe {self.text}: {pattern}" if pattern else f"recipe {self.text}"
