"""Sources that are already quantized, seen as the BF16 model that they stand for. Headers and config.json only.

Two methods are read.

- ``fp8`` (DeepSeek-V3, Qwen3-FP8, MiniMax-M2): ``X.weight`` E4M3 [out, in] with ``X.weight_scale_inv`` F32
  [ceil(out/r), ceil(in/c)]; value = weight * scale, r and c from ``weight_block_size``.
- ``mxfp4`` (gpt-oss): ``X_blocks`` U8 [E, out, in/32, 16] with ``X_scales`` U8 [E, out, in/32]; they stand for ``X``
  [E, in, out].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.models.types import Scheme, TensorInfo

FP8, MXFP4 = "fp8", "mxfp4"
METHODS = (FP8, MXFP4)
SCALE_INV = "weight_scale_inv"
VALUE_DTYPE = "BF16"
"""What the values are written as: the dtype that these models were trained and are computed in."""

_MX_BLOCK = 32


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config.json whose source can be dequantized here; None for plain and for other sources."""
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    method, block = found.get("quant_method"), found.get("weight_block_size")
    if method == MXFP4:
        return Scheme(method=MXFP4, block=(1, _MX_BLOCK))
    if method != FP8 or not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = block
    usable = all(type(size) is int and size > 0 for size in block)
    return Scheme(method=FP8, block=(rows, columns)) if usable else None


def keeps_values(scheme: Scheme, format_name: str) -> bool:
    """True when ``format_name`` can hold the source's own numbers: copied, or MXFP4 cast to NVFP4."""
    if scheme.method == FP8:
        return format_name == "fp8_block" and scheme.block == (128, 128)
    return format_name in ("mxfp4", "nvfp4", "w4a16_nvfp4")


def logical_tensors(scheme: Scheme, stored: Iterable[TensorInfo]) -> list[TensorInfo]:
    """The tensors of the BF16 model, under their names there, in the order of ``stored``.

    Everything that is not quantized stays as it is. ToolchainError TC-023 when scales are missing, left over or of
    another shape than the weights need.
    """
    tensors = {info.name: info for info in stored}
    taken: set[str] = set()
    logical = []
    for info in tensors.values():
        scale = scale_name(scheme, info)
        if scale is None:
            logical.append(info)
            continue
        taken.add(scale)
        logical.append(_logical(scheme, info, tensors.get(scale)))
    if not taken:
        raise _broken(f"quantization_config says {scheme.method}, but no tensor is stored so")
    left = [info.name for info in logical if _is_scale(scheme, info.name) and info.name not in taken]
    if left:
        raise _broken(f"{len(left)} scales belong to no weight: {', '.join(left[:3])}")
    return [info for info in logical if info.name not in taken]


def scale_name(scheme: Scheme, info: TensorInfo) -> str | None:
    """Name of the scales of a quantized tensor; None for one that is not quantized."""
    if scheme.method == FP8 and info.dtype == "F8_E4M3":
        return f"{info.name}_scale_inv"
    if scheme.method == MXFP4 and info.name.endswith("_blocks"):
        return f"{info.name.removesuffix('_blocks')}_scales"
    return None


def _is_scale(scheme: Scheme, name: str) -> bool:
    return name.endswith("_scale_inv" if scheme.method == FP8 else "_scales")


def _logical(scheme: Scheme, info: TensorInfo, scale: TensorInfo | None) -> TensorInfo:
    if scale is None:
        raise _broken(
            f"{info.name} ({info.dtype}) has no scales beside it: expected {scale_name(scheme, info)}"
        )
    name, shape = info.name, info.shape
    if scheme.method == FP8:
        wanted = tuple(-(-size // block) for size, block in zip(shape, scheme.block, strict=False))
        fits = len(shape) == 2
    else:
        name, wanted = name.removesuffix("_blocks"), shape[:-1]
        fits = len(shape) == 4 and shape[-1] * 2 == _MX_BLOCK and info.dtype == scale.dtype == "U8"
        shape = (shape[0], shape[2] * _MX_BLOCK, shape[1]) if fits else shape
    if not fits or scale.shape != wanted:
        raise _broken(
            f"{info.name} ({info.dtype} {list(info.shape)}) has scales {scale.dtype} {list(scale.shape)}, "
            f"expected {list(wanted)} for blocks of {scheme.block[0]} x {scheme.block[1]}"
        )
    return TensorInfo(name=name, shape=shape, dtype=VALUE_DTYPE, file=info.file)


def _broken(what: str) -> ToolchainError:
    return ToolchainError(
        what,
        hint="the files and quantization_config in config.json are not of one model: fetch it again",
        code="TC-023",
    )
