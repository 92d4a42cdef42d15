"""A checkpoint against its source: what is not quantized is bit-equal, what is quantized differs by rounding only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from toolchain.checkpoint.audit.arranged import RECIPE, ArrangedSource
from toolchain.checkpoint.audit.rounding import Error, compare
from toolchain.checkpoint.audit.sparsity import claimed, pruned_source
from toolchain.checkpoint.audit.subject import Subject
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.codecs.fused import split_experts
from toolchain.core.errors import ToolchainError
from toolchain.core.files import read_json
from toolchain.core.findings import Finding
from toolchain.core.progress import Progress
from toolchain.core.roles import Role
from toolchain.formats import Format
from toolchain.recipes import INGREDIENTS

if TYPE_CHECKING:
    import torch

SLACK, BF16 = 1.02, 2.0**-8
"""A little more than rounding: float32 arithmetic, and half a step of BF16, which weights went through when channel
scales were multiplied in."""
LOST = 0.9
"""A relative error of 1 is that of a matrix of zeros: no recipe that corrects weights comes near."""
UNKNOWN = 2.0
"""Times the bound that a checkpoint of unknown origin may have: GPTQ's corrections of the tests' models reach 1.2."""
CHANGING_AXES = ("target", "rounding")
"""Ingredients of recipes that move weights on purpose, away from the nearest code."""


@dataclass
class Comparison:
    """Errors of the quantized matrices, gathered while findings are yielded."""

    subject: Subject
    source: CheckpointReader
    progress: Progress
    errors: dict[str, tuple[Format, Error]] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    def findings(self) -> Iterator[Finding]:
        """Missing, changed and foreign tensors, then matrices that rounding does not explain."""
        yield from self._plain()
        yield from self._foreign()
        yield from self._quantized()

    def _plain(self) -> Iterator[Finding]:
        import torch

        subject, folded = self.subject, any(item.has_pre_quant_scale for item in self.subject.formats)
        names = list(self.source.infos)
        for name in self.progress.track(names, description="compare with source", total=len(names)):
            module, suffix = subject.family.split(name)
            if module in subject.quantized and suffix == "weight":
                continue
            role = subject.part(name).role
            if name not in subject.reader.infos:
                message = "is in the source, but not in the checkpoint"
                yield Finding(code="TC-326", where=name, message=message)
            elif not torch.equal(_bits(subject.reader.get(name)), _bits(self.source.get(name))):
                if folded and role is Role.NORM:
                    message = "norm differs from the source (a channel scale was folded into it)"
                    yield Finding(code="TC-327", where=name, message=message, severity="warning")
                else:
                    message = f"{role.value} differs from the source"
                    yield Finding(code="TC-327", where=name, message=message)

    def _foreign(self) -> Iterator[Finding]:
        """Tensors that neither the source nor quantization explains."""
        for name in self.subject.reader.infos:
            module, _ = self.subject.family.split(name)
            explained = module in self.subject.quantized or name.endswith((".k_scale", ".v_scale"))
            if not explained and name not in self.source.infos:
                message = "is in the checkpoint, but not in the source"
                yield Finding(code="TC-350", where=name, message=message, severity="warning")

    def _quantized(self) -> Iterator[Finding]:
        recipe, zeros = _recipe(self.subject), claimed(self.subject)
        modules = [name for name in self.subject.quantized if f"{name}.weight" in self._sources()]
        moved = ArrangedSource(self.subject.family) if recipe is None or RECIPE in recipe.split("+") else None
        if moved is not None:
            modules.sort(key=lambda name: (self.subject.part(name).layer or 0, moved.part(name) or 0))
        for module in self.progress.track(modules, description="decode and compare", total=len(modules)):
            found = self.subject.format_of(module)
            if found is None:
                continue
            for name, tensors, weight in self._matrices(module):
                factor = self._factor(name, tensors)
                try:
                    if zeros is not None:
                        weight = pruned_source(zeros, found, tensors["weight"], weight)
                    error = compare(found, tensors, weight, factor)
                    beyond = not error.relative <= error.bound * SLACK + BF16
                    if moved is not None and (beyond or moved.expects(name)):
                        weight = moved.arranged(name, found, tensors, weight)
                        error = compare(found, tensors, weight, factor)
                except (RuntimeError, KeyError, ValueError, IndexError) as reason:
                    # Wrong shapes and missing scales are findings of their own.
                    message = f"cannot be decoded: {str(reason).splitlines()[0]}"
                    yield Finding(code="TC-351", where=name, message=message)
                    continue
                self.errors[name] = (found, error)
                limit = error.bound * SLACK + BF16
                if not error.relative <= limit:
                    channels = recipe is None and _fits_channels(found, tensors, weight, limit)
                    yield _beyond(name, error, limit, recipe, channels)

    def _sources(self) -> dict[str, str]:
        """``<module>.weight`` -> name in the source; fused experts have no suffix there."""
        if not self._names:
            split = self.subject.family.split
            self._names = {".".join(split(name)): name for name in self.source.infos}
        return self._names

    def _matrices(self, module: str) -> Iterator[tuple[str, dict[str, torch.Tensor], torch.Tensor]]:
        """(name, stored tensors, source weight [out, in]) of a module: one, or one per expert and projection."""
        family, reader = self.subject.family, self.subject.reader
        tensors = {suffix: reader.get(info.name) for suffix, info in self.subject.modules[module].items()}
        weight = self.source.get(self._sources()[f"{module}.weight"])
        if not family.is_fused(module):
            tensors.pop("bias", None)
            yield module, tensors, weight
            return
        sources = {name: own["weight"] for name, own in split_experts(family, module, {"weight": weight})}
        for name, own in split_experts(family, module, tensors):
            own.pop("bias", None)
            yield name, own, sources[name]

    def _factor(self, module: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """[in] what the input of ``module`` is multiplied by on its way, against the source; None for nothing.

        Either stored beside it (``pre_quant_scale``), or in the norm before it, whose weights then are larger by it.
        """
        if "pre_quant_scale" in tensors:
            return tensors["pre_quant_scale"].float()
        for norm, consumers in self.subject.family.norm_folds:
            for consumer in consumers:
                if module.endswith(f".{consumer}"):
                    return self._norm_ratio(f"{module.removesuffix(consumer)}{norm}.weight")
        return None

    def _norm_ratio(self, name: str) -> torch.Tensor | None:
        import torch

        if name not in self.subject.reader.infos or name not in self.source.infos:
            return None
        ours, theirs = self.subject.reader.get(name).float(), self.source.get(name).float()
        if torch.equal(ours, theirs):
            return None
        return torch.where(theirs != 0, ours / theirs, torch.ones_like(ours))

    def report(self, top: int) -> dict[str, Any]:
        """The worst offenders, and a summary per format."""
        by_format: dict[str, list[Error]] = {}
        for found, error in self.errors.values():
            by_format.setdefault(found.name, []).append(error)
        summary = {
            name: {
                "matrices": len(errors),
                "median_relative_error": median(error.relative for error in errors),
                "max_relative_error": max(error.relative for error in errors),
                "max_bound": max(error.bound for error in errors),
            }
            for name, errors in by_format.items()
        }
        worst = sorted(self.errors.items(), key=lambda item: -item[1][1].relative)[:top]
        return {"by_format": summary, "worst": [_row(name, *found) for name, found in worst]}


def _row(name: str, found: Format, error: Error) -> dict[str, Any]:
    return {
        "name": name,
        "format": found.name,
        "relative_error": error.relative,
        "rounding_bound": error.bound,
        "worst_block": error.worst,
        "worst_block_at": list(error.worst_at),
    }


def _beyond(name: str, error: Error, limit: float, recipe: str | None, channels: bool) -> Finding:
    """Further from the source than rounding at its scales can be."""
    message = f"relative error {error.relative:.3g}, rounding at its scales reaches at most {limit:.3g}"
    if recipe is not None and _moves_weights(recipe) and error.relative < LOST:
        hint = f"recipe {recipe} moves weights on purpose"
        return Finding(code="TC-348", where=name, message=message, hint=hint, severity="warning")
    if recipe is None and error.relative < UNKNOWN * limit:
        hint = "GPTQ and the like move weights on purpose; if none was used, something is wrong"
        return Finding(code="TC-348", where=name, message=message, hint=hint, severity="warning")
    if channels:
        hint = "but for one factor per channel it is the source's: the counterpart must be in the layer before or after"
        return Finding(code="TC-349", where=name, message=message, hint=hint, severity="warning")
    hint = "another matrix, a stale scale or another source; a recipe that corrects weights (GPTQ) stays far below 1"
    return Finding(code="TC-348", where=name, message=message, hint=hint)


def _fits_channels(
    found: Format, tensors: dict[str, torch.Tensor], weight: torch.Tensor, limit: float
) -> bool:
    """True when the best factor per input, or per output, brings the error below ``limit``, and one for all does not:
    AWQ and SmoothQuant of others fold their scales into whatever layer comes before. One factor for all is no channel
    scale but a wrong one."""
    import torch

    from toolchain.codecs import get_codec

    decoded, wanted = get_codec(found.name).unpack(tensors, torch.float32), weight.float()
    if not decoded.isfinite().all():
        return False
    norm = torch.linalg.vector_norm(wanted)
    left = []
    for dims in ((0, 1), (0,), (1,)):
        best = (decoded * wanted).sum(dims, keepdim=True) / decoded.square().sum(dims, keepdim=True)
        left.append(float(torch.linalg.vector_norm(decoded * best.nan_to_num() - wanted) / norm))
    return left[0] > limit >= min(left[1:])


def _recipe(subject: Subject) -> str | None:
    """The recipe of a checkpoint made here; None when nobody knows."""
    path = subject.directory / "quantize.json"
    if not path.is_file():
        return None
    try:
        return str(read_json(path).get("recipe") or "")
    except (ToolchainError, AttributeError):
        return None


def _moves_weights(recipe: str) -> bool:
    axes = {item.name: item.axis for item in INGREDIENTS}
    return any(axes.get(name) in CHANGING_AXES for name in recipe.split("+"))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8)
