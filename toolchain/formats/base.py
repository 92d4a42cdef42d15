"""A Format says how the numbers of one Linear are stored and computed. Declarations only: no torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of each dtype name that a safetensors header uses."""

WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
"""Suffixes of which every quantized Linear has one: what tells its bytes from those of a plain one."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor that a quantized Linear writes: ``<module>.<suffix>``."""

    suffix: str
    dtype: str
    """Safetensors dtype name; ``source`` means the dtype of the model (bf16 as a rule)."""
    aliases: tuple[str, ...] = ()
    """Other suffixes under which exporters store the same numbers, perhaps with extra dimensions of size 1."""
    shape: Callable[[int, int], tuple[int, ...]]
    """Shape from (out_features, in_features)."""
    required: bool = True
    """False for tensors that some modules leave out (``pre_quant_scale`` folded into a norm)."""
    scale: bool = False
    """True for scales: the audit demands finite and positive values."""


@dataclass(frozen=True, kw_only=True)
class Format:
    name: str
    title: str
    quant_algo: str
    """Value of ``quant_algo`` in hf_quant_config.json: a member of TensorRT-LLM's strict QuantAlgo enum."""
    algo_aliases: tuple[str, ...] = ()
    """Other values that mean the same, written by ModelOpt's exporter. Read, never written."""
    modelopt_preset: str
    """Name in ``modelopt.torch.quantization`` of the preset whose quantizer settings are used."""
    modelopt_format: str
    """What ModelOpt's exporter calls a Linear with these quantizers (``get_quantization_format``)."""
    weight_bits: int
    activation: str
    """What the target computes on: ``bf16`` (not rounded), ``fp8`` and ``int8`` (static per tensor), ``fp8_token``
    (dynamic, one scale per token), ``fp8_group`` (dynamic, one per 128 elements of a token), ``mxfp8`` (dynamic, one
    power of two per 32), ``nvfp4`` (dynamic blocks of 16 under a static scale)."""
    stored: tuple[Stored, ...]
    group_size: int | None = None
    """Elements of in_features that share a block scale; None for one scale per tensor."""
    in_multiple: int = 1
    """in_features of every rank must be a multiple of this."""
    out_multiple: int = 1
    equal_in_fused: tuple[str, ...] = ()
    """Scales that must be equal in q/k/v and in gate/up, because runtimes fuse those into one matmul."""
    requantized_in_fused: bool = False
    """True when runtimes mend unequal scales in a fused matmul: they take the largest and requantize the others, which
    costs accuracy. False: they assert equality, or silently use one scale for all."""
    moe_default_policy: str = "experts-only"
    """Policy preset that is the default for a mixture-of-experts model."""
    default_recipe: str = "max"
    """Recipe (``toolchain.recipes``) that the format's name promises: ``awq`` for int4_awq."""
    learned_scales: bool = False
    """True when training can learn the block scales of weights: ModelOpt's LSQ is for NVFP4 blocks only."""

    def __hash__(self) -> int:
        """By name: the generated one walks all fields, for each of a model's matrices."""
        return hash(self.name)

    @property
    def has_pre_quant_scale(self) -> bool:
        """True when a factor per input channel is stored with every matrix whose norm does not take it."""
        return any(item.suffix == "pre_quant_scale" for item in self.stored)

    @property
    def has_input_scale(self) -> bool:
        """True when a calibrated range of the input is stored."""
        return any(item.suffix == "input_scale" for item in self.stored)

    def stored_bytes(self, out_features: int, in_features: int, *, source_dtype: str = "BF16") -> int:
        """Bytes on disk of one quantized Linear [out_features, in_features], required tensors only."""
        return _stored_bytes(self, out_features, in_features, source_dtype)

    def bits_per_weight(self, out_features: int = 4096, in_features: int = 4096) -> float:
        """Effective bits per weight, scales included."""
        return self.stored_bytes(out_features, in_features) * 8 / (out_features * in_features)


@lru_cache(maxsize=4096)
def _stored_bytes(format: Format, out_features: int, in_features: int, source_dtype: str) -> int:
    return sum(
        prod(item.shape(out_features, in_features))
        * DTYPE_BYTES[source_dtype if item.dtype == "source" else item.dtype]
        for item in format.stored
        if item.required
    )


def same_stored(left: Format, right: Format) -> bool:
    """True when a checkpoint cannot tell the two apart: GPTQ and AWQ choose other numbers for one layout."""
    return left.quant_algo == right.quant_algo


PRE_QUANT_SCALE = Stored(
    suffix="pre_quant_scale", dtype="source", shape=lambda n, k: (k,), required=False, scale=True
)
"""A factor per input channel; absent where the norm before the matrix took it."""


def scalar(_out_features: int, _in_features: int) -> tuple[int, ...]:
    """Shape of a per-tensor scale: zero-dimensional, as ModelOpt writes it."""
    return ()
