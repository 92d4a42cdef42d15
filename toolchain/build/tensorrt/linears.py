"""One Linear of a TensorRT-LLM checkpoint: fused from Linears of the unified checkpoint, and a rank's share of it.

Numbers are copied, never rounded again: codes are cut and joined along channels, scales go with them. Only FP8 codes of
matrices that are fused under different scales would have to be (what an audited checkpoint does not have). Suffixes and
shapes: ``preprocess_perlayer_weights`` in ``tensorrt_llm/models/modeling_utils.py`` and
``quantization/layers.py`` of 1.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from toolchain.build.tensorrt.mapping import WHOLE, Share
from toolchain.core.errors import ToolchainError
from toolchain.formats.base import Format

if TYPE_CHECKING:
    import torch

Cut = Literal["column", "row", "none"]
"""Along out_features, along in_features, or the whole matrix on every rank."""

GROUP_SCALED = ("int4_awq", "int4_gptq", "w4a8_awq", "nvfp4")
"""Formats whose ``weights_scaling_factor`` is [out, in / group]."""
CHANNEL_SCALED = ("int4_awq", "int4_gptq", "w4a8_awq", "int8_sq")
"""Formats whose Linears have a ``prequant_scaling_factor`` always: a parameter of their classes in
``quantization/layers.py``. Where the norm before took it, it is all ones."""
SCALARS = (
    ("input_scale", "activation_scaling_factor"),
    ("weight_scale_2", "weights_scaling_factor_2"),
)


class Source(Protocol):
    """Stored tensors by name: with their numbers, or on the meta device, with shapes only."""

    dtype: torch.dtype
    """Of everything that is not quantized."""

    def get(self, name: str) -> torch.Tensor: ...
    def has(self, name: str) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Member:
    """A Linear of the unified checkpoint that becomes a part of a fused one, and the rank's share of its output."""

    module: str
    share: Share = WHOLE
    """Column cuts only. Key and value heads that several ranks hold have a share other than the queries'."""


def rank_linear(
    source: Source, members: Sequence[Member], format: Format | None, cut: Cut, share: Share
) -> Iterator[tuple[str, torch.Tensor]]:
    """(suffix, tensor) of the rank's share of ``members`` joined along out_features.

    ``share`` is of in_features, for row cuts. ``format`` None: weights in the model's dtype.
    """
    parts = [_stored(source, member) for member in members]
    if format is None:
        weights = [part["weight"].to(source.dtype) for part in parts]
        yield "weight", _cut_all(weights, members, cut, share)
    else:
        yield from _quantized(source, parts, members, format, cut, share)
    if "bias" in parts[0]:
        biases = [part["bias"].to(source.dtype) for part in parts]
        # A row-parallel bias is added once, after the ranks' sums: every rank holds all of it.
        yield "bias", _cut_all(biases, members, cut if cut == "column" else "none", share)


def _stored(source: Source, member: Member) -> dict[str, torch.Tensor]:
    suffixes = (
        "weight", "bias", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale",
    )  # fmt: skip
    names = {suffix: f"{member.module}.{suffix}" for suffix in suffixes}
    return {suffix: source.get(name) for suffix, name in names.items() if source.has(name)}


def _quantized(
    source: Source,
    parts: list[dict[str, torch.Tensor]],
    members: Sequence[Member],
    format: Format,
    cut: Cut,
    share: Share,
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    where = members[0].module
    if format.name == "fp8":
        scale, codes = _one_fp8_scale(parts)
        yield "weight", _cut_all(codes, members, cut, share)
        yield "weights_scaling_factor", scale
    else:
        codes = [part["weight"] for part in parts]
        if format.name != "nvfp4":
            codes = [code.view(torch.int8) for code in codes]
        yield "weight", _cut_all(codes, members, cut, share)
        scales = [part["weight_scale"] for part in parts]
        along = cut if cut == "column" or format.name in GROUP_SCALED else "none"
        yield "weights_scaling_factor", _cut_all(scales, members, along, share)
    for stored, suffix in SCALARS:
        if stored in parts[0]:
            yield suffix, _equal(parts, stored, where).float().reshape(1)
    if format.name in CHANNEL_SCALED:
        factor = _channel_factor(source, parts, format, where)
        yield "prequant_scaling_factor", _part(factor, share, 0) if cut == "row" else factor


def _channel_factor(
    source: Source, parts: list[dict[str, torch.Tensor]], format: Format, where: str
) -> torch.Tensor:
    """[in_features] in the model's dtype."""
    import torch

    if any("pre_quant_scale" in part for part in parts):
        return _equal(parts, "pre_quant_scale", where).to(source.dtype).contiguous()
    width = parts[0]["weight"].shape[1]
    return torch.ones(width, dtype=source.dtype, device=parts[0]["weight"].device)


def _equal(parts: list[dict[str, torch.Tensor]], suffix: str, where: str) -> torch.Tensor:
    """What fused matrices must agree on. ToolchainError TC-421 otherwise."""
    import torch

    first = parts[0].get(suffix)
    same = first is not None and all(suffix in part for part in parts)
    if same and first is not None and not first.is_meta:
        same = all(torch.equal(first, part[suffix]) for part in parts)
    if first is None or not same:
        raise ToolchainError(
            f"{where}: {suffix} differs between matrices that TensorRT fuses into one",
            hint="quantize again: `toolchain quantize` gives them one",
            code="TC-421",
        )
    return first


def _one_fp8_scale(parts: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(scale [1], codes): one scale for all. Codes under a smaller one are rounded again under the largest, as
    TensorRT-LLM's own loader does (``MOEWeightWrapper.postprocess``)."""
    import torch

    from toolchain.codecs.fp8 import divide

    scales = torch.stack([part["weight_scale"].float().reshape(()) for part in parts])
    codes = [part["weight"] for part in parts]
    largest = scales.amax()
    if scales.is_meta or bool((scales == largest).all()):
        return largest.reshape(1), codes
    again = [
        code if scale == largest else divide(code.float() * scale, largest)
        for code, scale in zip(codes, scales, strict=True)
    ]
    return largest.reshape(1), again


def _cut_all(
    tensors: Sequence[torch.Tensor], members: Sequence[Member], cut: Cut, share: Share
) -> torch.Tensor:
    if cut == "column":
        pairs = zip(tensors, members, strict=True)
        return join([_part(tensor, member.share, 0) for tensor, member in pairs])
    whole = join(tensors)
    return _part(whole, share, 1) if cut == "row" else whole


def _part(tensor: torch.Tensor, share: Share, axis: int) -> torch.Tensor:
    size = tensor.shape[axis] // share.of
    return tensor.narrow(axis, share.index * size, size).contiguous()


def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenation along the first dimension, of FP8 numbers too."""
    import torch

    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].dtype
    if dtype.itemsize == 1:
        return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)
    return torch.cat(list(tensors))


def padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """[rows, ...] with rows of zeros up to a multiple: vocabularies are cut into equal parts."""
    import torch

    missing = -tensor.shape[0] % multiple
    if not missing:
        return tensor
    rows = torch.zeros(missing, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    return torch.cat((tensor, rows))


def part_of_rows(tensor: torch.Tensor, share: Share) -> torch.Tensor:
    """The rank's rows of a tensor whose first dimension divides."""
    return _part(tensor, share, 0)
