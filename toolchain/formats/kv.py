"""KV cache formats: how keys and values are stored while a sequence is generated. Declarations only."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.core.lookup import pick


@dataclass(frozen=True, kw_only=True)
class KvCache:
    name: str
    title: str
    quant_algo: str | None = None
    """Value of ``kv_cache_quant_algo`` in hf_quant_config.json; None keeps the model's dtype."""
    modelopt_preset: str = ""
    """Name of ModelOpt's preset (``modelopt_recipes/configs/ptq/presets/kv``)."""
    calibrated: bool = False
    """True when ``k_scale`` and ``v_scale`` are found by calibration and stored; else runtimes use 1.0."""
    bits: float = 16.0
    """Bits per element, block scales included; unused where ``quant_algo`` is None."""
    head_dim_multiple: int = 1


NONE = KvCache(name="none", title="the model's own dtype")
FP8 = KvCache(
    name="fp8",
    title="FP8 E4M3, one calibrated scale per layer for keys and one for values",
    quant_algo="FP8",
    modelopt_preset="fp8",
    calibrated=True,
    bits=8,
)
FP8_CAST = KvCache(
    name="fp8_cast",
    title="FP8 E4M3 under a constant scale of 1, no calibration",
    quant_algo="FP8",
    modelopt_preset="fp8_cast",
    bits=8,
)
NVFP4 = KvCache(
    name="nvfp4",
    title="NVFP4, blocks of 16 along head_dim under a calibrated scale",
    quant_algo="NVFP4",
    modelopt_preset="nvfp4",
    calibrated=True,
    bits=4.5,
    head_dim_multiple=16,
)
ALL: tuple[KvCache, ...] = (NONE, FP8, FP8_CAST, NVFP4)


def get_kv_cache(name: str) -> KvCache:
    """The KV cache format called ``name``; UsageError TC-107 lists the alternatives."""
    return pick(ALL, name, kind="KV cache", hint="`none` keeps the model's dtype", code="TC-107")
