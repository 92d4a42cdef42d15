"""The quantization config of a checkpoint: hf_quant_config.json and ``quantization_config`` in config.json.

Shapes: *legacy* ``{"producer", "quantization": {quant_algo, kv_cache_quant_algo, group_size, exclude_modules, ...}}``
and *flat* ``{"quant_method": "modelopt", "quant_algo", "ignore", "kv_cache_scheme", ...}``. TensorRT-LLM reads
hf_quant_config.json first (``_torch/model_config.py``); 1.2.1 is only known to read the legacy shape there, so that is
what we write, with the flat shape inside config.json, as ModelOpt 0.47 does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolchain.checkpoint.modelopt_file import conversion
from toolchain.core.errors import ToolchainError
from toolchain.core.files import read_json
from toolchain.core.roles import Role
from toolchain.families import Family
from toolchain.formats import Format, format_of_algo
from toolchain.formats.mxfp4 import MXFP4

FILE = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
CHANNEL_SCALED = ("W4A16_AWQ", "W4A8_AWQ")
"""Algorithms whose entry says so: ModelOpt's ``process_layer_quant_config`` adds ``pre_quant_scale``."""


TIED_HEAD = "lm_head"
"""Excluded by name also when it has no tensor of its own, as ModelOpt's exporter does."""


PUBLISHED_MXFP4: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""``quantization_config`` of gpt-oss as it was published. Such a checkpoint has no hf_quant_config.json."""


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    quant_algo: str | None
    kv_cache_quant_algo: str | None = None
    group_size: int | None = None
    exclude_modules: tuple[str, ...] = ()
    """Module names or fnmatch patterns of what keeps its dtype."""
    quantized_layers: dict[str, str] = field(default_factory=dict)
    """Exact module name -> quant_algo, for MIXED_PRECISION."""
    producer_version: str = ""
    shape: str = "legacy"

    def algo_of(self, module: str) -> str | None:
        """quant_algo of a module by its checkpoint name; None when it keeps its dtype."""
        if self.quant_algo == MIXED:
            return self.quantized_layers.get(module)
        return None if self.excludes(module) else self.quant_algo

    def format_of(self, module: str) -> Format | None:
        """Format of a module that is not excluded. ToolchainError for an algorithm that we do not know."""
        algo = self.algo_of(module)
        if algo is None:
            return None
        found = format_of_algo(algo)
        if found is None:
            raise ToolchainError(
                f"{module} is stored as {algo}, which is not supported here",
                hint="`toolchain list formats` shows what is",
                code="TC-301",
            )
        return found

    def excludes(self, module: str) -> bool:
        return matches(self.exclude_modules, module)


def matches(patterns: tuple[str, ...], module: str) -> bool:
    """True when ``module`` is one of the names, or fits one of the fnmatch patterns."""
    names, wildcards = _compiled(patterns)
    return module in names or (wildcards is not None and wildcards.match(module) is not None)


@lru_cache(maxsize=1024)
def _compiled(patterns: tuple[str, ...]) -> tuple[frozenset[str], re.Pattern[str] | None]:
    """Names in a set and patterns in one expression: a large MoE asks for 50,000 modules against hundreds of them."""
    wildcards = [pattern for pattern in patterns if any(sign in pattern for sign in "*?[")]
    return frozenset(patterns), re.compile("|".join(map(translate, wildcards))) if wildcards else None


def read_quant_config(directory: Path) -> QuantConfig | None:
    """The quantization config of a checkpoint directory; None for one that is not quantized."""
    path = directory / FILE
    if path.is_file():
        return parse_quant_config(read_json(path), str(path))
    config = directory / "config.json"
    inline = read_json(config).get("quantization_config") if config.is_file() else None
    return parse_quant_config(inline, f"{config}: quantization_config") if inline else None


def parse_quant_config(value: Any, where: str) -> QuantConfig:
    """Read either shape. ToolchainError says what is missing."""
    if not isinstance(value, dict):
        raise ToolchainError(f"{where} holds {type(value).__name__}, expected an object", code="TC-302")
    producer = value.get("producer") or {}
    version = str(producer.get("version", "")) if isinstance(producer, dict) else ""
    if "quantization" in value:
        inner = value["quantization"]
        layers = inner.get("quantized_layers") or {}
        return QuantConfig(
            quant_algo=inner.get("quant_algo"),
            kv_cache_quant_algo=inner.get("kv_cache_quant_algo"),
            group_size=inner.get("group_size"),
            exclude_modules=tuple(inner.get("exclude_modules") or ()),
            quantized_layers={name: layer.get("quant_algo", "") for name, layer in layers.items()},
            producer_version=version,
        )
    if "quant_algo" in value:
        layers = value.get("quantized_layers") or {}
        return QuantConfig(
            quant_algo=value["quant_algo"],
            kv_cache_quant_algo=kv_algo_of_scheme(value.get("kv_cache_scheme")),
            group_size=value.get("group_size"),
            exclude_modules=tuple(value.get("ignore") or ()),
            quantized_layers={name: layer.get("quant_algo", "") for name, layer in layers.items()},
            producer_version=version,
            shape="flat",
        )
    if value.get("quant_method") == PUBLISHED_MXFP4["quant_method"]:
        names = value.get("modules_to_not_convert") or ()
        # A name stands for a module and all below it.
        return QuantConfig(
            quant_algo=MXFP4.quant_algo,
            exclude_modules=tuple(f"{name}*" for name in names),
            shape="published",
        )
    raise ToolchainError(
        f"{where} has neither `quantization` nor `quant_algo` (quant_method {value.get('quant_method')!r})",
        hint="only checkpoints in ModelOpt's unified layout are run; `toolchain convert` makes one of "
        "compressed-tensors checkpoints",
        code="TC-302",
    )


def kv_algo_of_scheme(scheme: Any) -> str | None:
    """kv_cache_scheme -> algorithm, by TensorRT-LLM's rule: {float, 8} FP8, {float, 4} NVFP4, {int, 8} INT8."""
    if not isinstance(scheme, dict):
        return str(scheme) if scheme else None
    kinds = {("float", 8): "FP8", ("float", 4): "NVFP4", ("int", 8): "INT8"}
    return kinds.get((str(scheme.get("type")), int(scheme.get("num_bits", 0))))


def render_legacy(config: QuantConfig) -> dict[str, Any]:
    """The content of hf_quant_config.json.

    MIXED_PRECISION names its layers one by one, and excludes by name too: ModelOpt leaves that list out there, but
    runtimes that find one read it.
    """
    body: dict[str, Any] = {
        "quant_algo": config.quant_algo,
        "kv_cache_quant_algo": config.kv_cache_quant_algo,
    }
    if config.quant_algo == MIXED:
        layers = config.quantized_layers.items()
        body["quantized_layers"] = {name: layer_entry(_known(algo, name)) for name, algo in layers}
    elif config.quant_algo is not None:
        body |= layer_entry(_known(config.quant_algo, FILE))
    body["exclude_modules"] = list(config.exclude_modules)
    return {"producer": {"name": "modelopt", "version": config.producer_version}, "quantization": body}


def layer_entry(format: Format) -> dict[str, Any]:
    """What a config says about modules in ``format``, with the keys of ModelOpt's ``process_layer_quant_config``."""
    entry: dict[str, Any] = {"quant_algo": format.quant_algo}
    if format.group_size is not None:
        entry["group_size"] = format.group_size
    if format.quant_algo in CHANNEL_SCALED:
        entry |= {"has_zero_point": False, "pre_quant_scale": True}
    return entry


def algo_per_module(modules: Mapping[str, Format], family: Family) -> dict[str, str]:
    """``quantized_layers``: exact module names -> quant_algo, and the experts of a layer once more under their parent.

    TensorRT-LLM asks for ``...mlp.experts`` by that name in some families and looks for it inside the names of the
    projections in others (``_get_experts_quant_config``, ``apply_layerwise_quant_config``). ModelOpt's exports of fused
    experts have the first, those of unfused experts the second.
    """
    found: dict[str, str] = {}
    for name, format in modules.items():
        experts = re.match(r".*\.experts(?=\.)", name)
        if experts and family.classify(name).role is Role.ROUTED_EXPERT:
            found.setdefault(experts.group(), format.quant_algo)
        found[name] = format.quant_algo
    return found


def _known(algo: str, where: str) -> Format:
    found = format_of_algo(algo)
    if found is None:
        raise ToolchainError(
            f"{where}: unknown quant_algo {algo!r}", hint="`toolchain list formats`", code="TC-301"
        )
    return found


def render_flat(legacy: dict[str, Any]) -> dict[str, Any]:
    """``quantization_config`` for config.json, by ModelOpt's own conversion."""
    return {**conversion().convert_hf_quant_config_format(legacy), "quant_method": "modelopt"}


def summarize_excluded(unquantized: Iterable[str], quantized: Iterable[str]) -> tuple[str, ...]:
    """Names of unquantized modules, with ``block*`` where a whole block of a decoder layer is unquantized.

    The wildcard matters: TensorRT-LLM asks for fused names (``self_attn.qkv_proj``) that no checkpoint lists.
    """
    taken = sorted(quantized)
    return tuple(sorted({_widest(name, taken) for name in unquantized}))


def _widest(name: str, quantized: list[str]) -> str:
    from bisect import bisect_left

    layer = re.match(r".*?\blayers\.\d+\.", name)
    if layer is None:
        return name
    pieces = name[layer.end() :].split(".")
    for depth in range(1, len(pieces)):
        prefix = layer.group() + ".".join(pieces[:depth])
        index = bisect_left(quantized, prefix)
        if index == len(quantized) or not quantized[index].startswith(prefix):
            return f"{prefix}*"
    return name
