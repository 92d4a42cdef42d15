"""The quantizer patterns of a ModelOpt recipe, evaluated by name as ModelOpt does, without a model in memory.

Entries apply in their order: one with a ``cfg`` replaces what was there, one without only switches on or off
(``set_quantizer_by_cfg``). Names are the module paths that quantization here will have: those of transformers 5, with
unfused experts.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from typing import Any

from toolchain.formats import FORMATS, KV_CACHES, Format, get_kv_cache
from toolchain.quantize.backend import E2M1, E4M3
from toolchain.quantize.quantizers import PINNED_AMAX

LINEAR, EMBEDDING = "nn.Linear", "nn.Embedding"
PROBE = "model.layers.0.mlp.experts.0.gate_proj"
"""A path that every preset of ModelOpt quantizes, those for experts or MLPs only included."""
FOUR_OVER_SIX = "four_over_six"
_NOT_STORED = ("enable", "effective_bits")
"""Attributes of a quantizer that say nothing about numbers: on or off, and what a search counts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What the entries make of one quantizer; one object for all quantizers that no pattern tells apart."""

    enabled: bool
    cfg: Any
    """Attributes, or a list of them for quantizers in sequence; None: ModelOpt's INT8 default."""
    pattern: str
    """Pattern of the entry that decided last; empty when none did."""


@dataclass
class Patterns:
    """Ordered entries of ``quant_cfg``, normalized by ModelOpt."""

    entries: list[Mapping[str, Any]]
    _memory: dict[tuple[str, str], Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [str(entry["quantizer_name"]) for entry in self.entries]
        self._compiled = [re.compile(translate(name)) for name in names]
        # Where no pattern can tell indices apart, one expert of one layer answers for all. The digit of `conv1d` is no
        # index, that of `layers.1.` is one.
        self._numbered = any(re.search(r"(?<![A-Za-z_])\d|\?|\[[^\]]*-", name) for name in names)

    def of(self, path: str, quantizer: str, parent_class: str = LINEAR) -> Setting:
        """The setting of ``path``'s ``quantizer`` (``weight_quantizer``, ``k_bmm_quantizer``...)."""
        name = f"{path}.{quantizer}"
        key = (name if self._numbered else re.sub(r"\.\d+(?=\.)", ".0", name), parent_class)
        if key not in self._memory:
            self._memory[key] = self._resolve(name, parent_class)
        return self._memory[key]

    def _resolve(self, name: str, parent_class: str) -> Setting:
        found = Setting(enabled=not name.endswith("output_quantizer"), cfg=None, pattern="")
        for entry, compiled in zip(self.entries, self._compiled, strict=True):
            if not compiled.match(name) or entry.get("parent_class") not in (None, parent_class):
                continue
            cfg = entry["cfg"]
            found = Setting(
                enabled=bool(entry["enable"]),
                cfg=found.cfg if cfg is None else _plain(cfg),
                pattern=str(entry["quantizer_name"]),
            )
        return found


def read_patterns(quant_cfg: Any) -> Patterns:
    """``quant_cfg`` of a recipe or preset, in any of the forms that ModelOpt takes."""
    from modelopt.torch.quantization.config import normalize_quant_cfg_list

    return Patterns(list(normalize_quant_cfg_list(quant_cfg)))


def _plain(cfg: Any) -> Any:
    if isinstance(cfg, list):
        return [_plain(item) for item in cfg]
    return copy.deepcopy(cfg) if isinstance(cfg, dict) else cfg.model_dump(exclude_unset=True)


@lru_cache(maxsize=4096)
def signature(setting: Setting, *, weights: bool) -> str:
    """What a quantizer does to numbers, comparable; empty for one that is off."""
    if not setting.enabled:
        return ""
    cfgs = setting.cfg if isinstance(setting.cfg, list) else [setting.cfg or {"num_bits": 8, "axis": 0}]
    return json.dumps([_attributes(item, weights) for item in cfgs], sort_keys=True, default=str)


def _attributes(cfg: Mapping[str, Any], weights: bool) -> dict[str, Any]:
    """Attributes that differ from ModelOpt's defaults. How scales of weights are found is the algorithm's business."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    plain = QuantizerAttributeConfig().model_dump()
    found = QuantizerAttributeConfig(**cfg).model_dump()
    kept = {
        name: value
        for name, value in found.items()
        if name not in _NOT_STORED and (value != plain[name] or name in ("num_bits", "axis"))
    }
    if kept.get("constant_amax") == PINNED_AMAX and tuple(found["num_bits"]) == E2M1:
        kept.pop("constant_amax")  # an ingredient of the recipe, not another format
    blocks = kept.get("block_sizes")
    if blocks:
        kept.pop("axis", None)
        blocks = {
            str(name): value for name, value in blocks.items() if name != FOUR_OVER_SIX and value is not None
        }
        if weights:
            blocks.pop("type", None)
        kept["block_sizes"] = blocks
    return kept


def is_nvfp4(setting: Setting) -> bool:
    """True for E2M1 in blocks under E4M3 scales."""
    attributes = _attributes(setting.cfg, weights=False) if isinstance(setting.cfg, dict) else {}
    scales = attributes.get("block_sizes", {}).get("scale_bits")
    return setting.enabled and (attributes.get("num_bits"), scales) == (E2M1, E4M3)


def asks_pinned(setting: Setting) -> bool:
    """True when the input range of NVFP4 is fixed so that its scale is 1."""
    return is_nvfp4(setting) and (setting.cfg or {}).get("constant_amax") == PINNED_AMAX


def asks_four_over_six(setting: Setting) -> bool:
    """True when blocks may choose a largest code of 4."""
    cfg = setting.cfg if isinstance(setting.cfg, dict) else {}
    return bool((cfg.get("block_sizes") or {}).get(FOUR_OVER_SIX))


@lru_cache(maxsize=1)
def known_formats() -> dict[tuple[str, str], tuple[Format, ...]]:
    """(signature of weights, signature of inputs) -> the formats whose preset has these settings."""
    import modelopt.torch.quantization as mtq

    found: dict[tuple[str, str], tuple[Format, ...]] = {}
    for item in FORMATS:
        preset = getattr(mtq, item.modelopt_preset)
        patterns = read_patterns(preset["quant_cfg"] if isinstance(preset, dict) else preset.quant_cfg)
        key = (
            signature(patterns.of(PROBE, "weight_quantizer"), weights=True),
            signature(patterns.of(PROBE, "input_quantizer"), weights=False),
        )
        found[key] = (*found.get(key, ()), item)
    return found


@lru_cache(maxsize=1)
def known_kv_caches() -> dict[str, str]:
    """Signature -> name of the KV cache format with these settings; the empty one is ``none``."""
    from modelopt.recipe.presets import KV_QUANT_CFG_CHOICES

    found = {"": "none"}
    for name in KV_CACHES:
        preset = get_kv_cache(name).modelopt_preset
        if preset:
            patterns = read_patterns(KV_QUANT_CFG_CHOICES[preset]["quant_cfg"])
            found[signature(patterns.of("model.layers.0.self_attn", "k_bmm_quantizer"), weights=False)] = name
    return found


def describe(settings: Iterable[tuple[str, Setting]]) -> str:
    """``weight_quantizer {...}, input_quantizer off``, for errors."""
    return ", ".join(
        f"{name} {json.dumps(setting.cfg, default=str) if setting.enabled else 'off'}"
        for name, setting in settings
    )
