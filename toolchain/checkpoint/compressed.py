"""compressed-tensors directories (llm-compressor), seen in ModelOpt's layout: other names, same numbers.

| there | here |
|---|---|
| ``weight_packed`` U8 (NVFP4) | ``weight``, as it is |
| ``weight_global_scale``, ``input_global_scale`` [1] | ``weight_scale_2``, ``input_scale``: 1 / value in float32 |
| ``weight_scale``, ``input_scale`` BF16 (FP8) | float32, exact; per channel [N, 1] becomes [N] |
| ``weight_scale`` BF16 of blocks | ``weight_scale_inv`` float32 |
| ``weight_packed`` I32 (INT4, offset 8) | ``weight`` U8 [N/2, K], two's complement; ``pre_quant_scale`` of ones |
| ``self_attn.k_scale`` | ``self_attn.k_proj.k_scale`` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.checkpoint.compressed_config import METHOD, Group, group_of, quant_config, read_groups
from toolchain.checkpoint.reader import CheckpointReader
from toolchain.core.errors import ToolchainError
from toolchain.families import get_family
from toolchain.formats import WEIGHT_SCALES
from toolchain.models.config import config_dtype, text_config
from toolchain.models.types import TensorInfo

if TYPE_CHECKING:
    import torch

PACKED = "weight_packed"
RECIPROCAL = "_global_scale"
"""End of the names of tensors that hold 1 / scale."""
KV_SCALES = ("k_scale", "v_scale")
DROPPED = ("weight_shape",)
"""Facts that the shape of the converted tensor tells itself."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor of the converted checkpoint."""

    info: TensorInfo
    origin: str
    """Stored tensor that it is made of; empty for one that is made up."""
    make: Callable[[torch.Tensor], torch.Tensor]


class CompressedReader(CheckpointReader):
    """``infos`` and ``get`` speak ModelOpt's layout; ``stored`` has the headers as they are."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        super().__init__(directory)
        self.config = config
        self.groups = read_groups(config["quantization_config"])
        names = [name.replace(PACKED, "weight") for name in self.stored]
        model_type, architecture = str(config.get("model_type", "")), config["architectures"][0]
        self.family = get_family(model_type, architecture, names, config=config)
        if self.family.fuses_experts:
            raise ToolchainError(
                f"{directory}: {self.family.name} stores the experts of a layer in one tensor, "
                "compressed-tensors one by one",
                hint="quantize this model from its source",
                code="TC-341",
            )
        self._entries = {entry.info.name: entry for entry in self._translate()}
        self.infos = {name: entry.info for name, entry in self._entries.items()}
        self.quant = self._quant_config()

    def origin(self, name: str) -> str:
        return self._entries[name].origin

    def get(self, name: str) -> torch.Tensor:
        if name not in self._entries:
            return super().get(name)
        entry = self._entries[name]
        if not entry.origin:
            import torch

            return entry.make(torch.empty(entry.info.shape))
        return entry.make(self.read_stored(entry.origin))

    def read_stored(self, name: str) -> torch.Tensor:
        """A tensor of the files, as it is."""
        return self._shard(self.stored[name].file).get_tensor(name)

    def _translate(self) -> list[_Entry]:
        modules: dict[str, dict[str, TensorInfo]] = {}
        for info in self.stored.values():
            module, _, suffix = info.name.rpartition(".")
            modules.setdefault(module, {})[suffix] = info
        entries: list[_Entry] = []
        for stored_module, tensors in modules.items():
            module = self.family.to_checkpoint(stored_module)
            if PACKED in tensors or set(tensors) & set(WEIGHT_SCALES):
                entries += self._quantized(module, group_of(self.groups, stored_module), tensors)
                continue
            for suffix, info in tensors.items():
                if suffix in KV_SCALES:
                    entries.append(_entry(f"{module}.{suffix[0]}_proj.{suffix}", "F32", (), info, _scalar))
                else:
                    entries.append(_entry(f"{module}.{suffix}", info.dtype, info.shape, info, _same))
        return entries

    def _quantized(self, module: str, group: Group, tensors: Mapping[str, TensorInfo]) -> list[_Entry]:
        entries = []
        for suffix, info in tensors.items():
            if suffix in DROPPED:
                continue
            made = _RULES[group.format.name].get(suffix)
            if made is None:
                entries.append(_entry(f"{module}.{suffix}", info.dtype, info.shape, info, _same))
                continue
            new, dtype, make, shape = made
            entries.append(_entry(f"{module}.{new}", dtype or info.dtype, shape(info.shape), info, make))
        if group.format.has_pre_quant_scale and PACKED in tensors and not self._is_behind_norm(module):
            entries.append(self._ones(module, tensors[PACKED]))
        return entries

    def _is_behind_norm(self, module: str) -> bool:
        """True for matrices whose factors TensorRT-LLM expects in the norm: it asks the others for the tensor."""
        return any(
            module.endswith(f".{consumer}") for _, group in self.family.norm_folds for consumer in group
        )

    def _ones(self, module: str, packed: TensorInfo) -> _Entry:
        import torch

        dtype = config_dtype(text_config(self.config))
        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        info = TensorInfo(
            name=f"{module}.pre_quant_scale", shape=(packed.shape[1] * 8,), dtype=dtype, file=packed.file
        )
        return _Entry(info=info, origin="", make=lambda like: torch.ones(like.shape, dtype=kinds[dtype]))

    def _quant_config(self) -> Any:
        found: dict[str, set[str]] = {}
        for name in self.infos:
            module, suffix = self.family.split(name)
            found.setdefault(module, set()).add(suffix)
        quantized = [module for module, suffixes in found.items() if suffixes & set(WEIGHT_SCALES)]
        plain = [
            module
            for module, suffixes in found.items()
            if "weight" in suffixes
            and not suffixes & set(WEIGHT_SCALES)
            and len(self.infos[self.family.join(module, "weight")].shape) >= 2
        ]
        return quant_config(self.config["quantization_config"], self.groups, self.family, quantized, plain)


def is_compressed(config: Mapping[str, Any]) -> bool:
    """True for a config.json whose weights are stored by compressed-tensors."""
    found = config.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == METHOD


def _entry(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    origin: TensorInfo,
    make: Callable[[torch.Tensor], torch.Tensor],
) -> _Entry:
    info = TensorInfo(name=name, shape=shape, dtype=dtype, file=origin.file)
    return _Entry(info=info, origin=origin.name, make=make)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float()


def _scalar(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().reshape(())


def _column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().flatten()


def _reciprocal(tensor: torch.Tensor) -> torch.Tensor:
    """1 / value in float32. Zero becomes infinity and is found by the audit: an expert without calibration has it."""
    return tensor.float().reshape(()).reciprocal()


def _int4(packed: torch.Tensor) -> torch.Tensor:
    """I32 [N, K/8], eight values + 8 from the low bits on -> U8 [N/2, K], two rows per byte."""
    import torch

    from toolchain.codecs.int4_awq import pack_rows

    pairs = packed.contiguous().view(torch.uint8)
    values = torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).flatten(-2)
    return pack_rows(values.to(torch.int8) - 8)


Shape = Callable[[tuple[int, ...]], tuple[int, ...]]
Rule = tuple[str, str, Callable[["torch.Tensor"], "torch.Tensor"], Shape]


def _kept(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _none(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A scalar, if there is one number; what is no scalar keeps its shape, which the audit then calls wrong."""
    return () if shape in ((), (1,)) else shape


_NVFP4: dict[str, Rule] = {
    PACKED: ("weight", "", _same, _kept),
    "weight_global_scale": ("weight_scale_2", "F32", _reciprocal, _none),
    "input_global_scale": ("input_scale", "F32", _reciprocal, _none),
}
_RULES: dict[str, dict[str, Rule]] = {
    "nvfp4": _NVFP4,
    "w4a16_nvfp4": _NVFP4,
    "fp8": {
        "weight_scale": ("weight_scale", "F32", _scalar, _none),
        "input_scale": ("input_scale", "F32", _scalar, _none),
    },
    "fp8_per_channel_per_token": {"weight_scale": ("weight_scale", "F32", _column, lambda shape: shape[:1])},
    "fp8_block": {"weight_scale": ("weight_scale_inv", "F32", _wide, _kept)},
    "int4_awq": {
        PACKED: ("weight", "U8", _int4, lambda shape: (shape[0] // 2, shape[1] * 8)),
        "weight_scale": ("weight_scale", "F32", _wide, _kept),
    },
}
"""Format -> stored suffix -> (suffix, dtype or as stored, conversion, its shape)."""
