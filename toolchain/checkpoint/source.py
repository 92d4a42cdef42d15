"""Source directories, read tensor by tensor as the model that they stand for: a quantized one as BF16 values.

The values are those of transformers' own dequantization: weight * scale in float32, rounded to BF16 once (FP8), and
E2M1 * 2^e, which BF16 holds exactly (MXFP4).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.checkpoint.reader import CheckpointReader
from toolchain.models.config import read_config, text_config
from toolchain.models.prequantized import FP8, logical_tensors, scale_name, scheme_of
from toolchain.models.types import Scheme, TensorInfo

if TYPE_CHECKING:
    import torch


class QuantizedSource(CheckpointReader):
    """``infos`` and ``get`` speak about the BF16 model; ``codes`` gives the numbers as they are stored."""

    def __init__(self, directory: Path, scheme: Scheme) -> None:
        super().__init__(directory)
        self.scheme = scheme
        self.infos = {info.name: info for info in logical_tensors(scheme, self.stored.values())}
        self._pairs: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        for info in self.stored.values():
            scale = scale_name(scheme, info)
            if scale is not None:
                self._pairs[info.name.removesuffix("_blocks")] = (info, self.stored[scale])

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names in the model of the tensors that are stored quantized."""
        return tuple(self._pairs)

    def codes(self, name: str) -> dict[str, torch.Tensor] | None:
        """Stored tensors (suffix -> tensor) of a quantized tensor by its name in the model; None for a plain one.

        ``weight`` with ``weight_scale_inv`` (FP8), or ``weight`` [E, out, in/32, 16] with ``weight_scale`` (MXFP4).
        """
        if name not in self._pairs:
            return None
        weight, scale = (self._shard(info.file).get_tensor(info.name) for info in self._pairs[name])
        return {"weight": weight, "weight_scale_inv" if self.scheme.method == FP8 else "weight_scale": scale}

    def get(self, name: str) -> torch.Tensor:
        codes = self.codes(name)
        if codes is None:
            return super().get(name)
        return self._fp8(codes) if self.scheme.method == FP8 else self._mxfp4(codes)

    def _fp8(self, codes: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch

        weight, (rows, columns) = codes["weight"], self.scheme.block
        scales = codes["weight_scale_inv"].float()
        spread = scales.repeat_interleave(rows, 0)[: weight.shape[0]]
        spread = spread.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        return (weight.float() * spread).to(torch.bfloat16)

    def _mxfp4(self, codes: dict[str, torch.Tensor]) -> torch.Tensor:
        """[E, in, out], an expert at a time: in float32 all experts of a layer would take eight times the file."""
        import torch

        from toolchain.codecs import get_codec

        codec = get_codec("mxfp4")
        experts, out_features, blocks, size = codes["weight"].shape
        values = torch.empty(experts, blocks * size * 2, out_features, dtype=torch.bfloat16)
        for expert in range(experts):
            own = {
                "weight": codes["weight"][expert].flatten(1),
                "weight_scale": codes["weight_scale"][expert],
            }
            values[expert] = codec.unpack(own, torch.bfloat16).T
        return values


def open_source(directory: Path) -> CheckpointReader:
    """Reader of a source directory: dequantizing, when its config.json names a method that is read here."""
    scheme = scheme_of(text_config(read_config(directory)))
    return QuantizedSource(directory, scheme) if scheme else CheckpointReader(directory)
