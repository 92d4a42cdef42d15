"""config.json: found, parsed, unwrapped, and asked for the numbers that planning needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.files import read_json
from toolchain.models.types import Attention

_MULTIMODAL_KEYS = ("text_config", "language_config", "llm_config")


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a directory. UsageError: TC-013 absent, TC-014 without an architecture."""
    path = directory / "config.json"
    if not path.is_file():
        names = sorted(item.name for item in directory.iterdir())[:5] if directory.is_dir() else []
        there = f"it holds {', '.join(names)}" if names else "nothing is there"
        raise UsageError(
            f"{directory} has no config.json ({there})",
            hint="give a Hugging Face model directory, or a hub id such as Qwen/Qwen3-30B-A3B",
            code="TC-013",
        )
    config = read_json(path)
    check_config(config, str(path))
    return config


def check_config(config: Any, where: str) -> None:
    """UsageError TC-014 unless ``config`` is an object that names one architecture and a model_type."""
    if not isinstance(config, dict):
        raise UsageError(f"{where} is a JSON {type(config).__name__}, expected an object", code="TC-014")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise UsageError(
            f"{where} has no architectures (found {architectures!r}), expected e.g. ['Qwen3MoeForCausalLM']",
            hint="without it no runtime knows which model to build: add the key, or fetch the model again",
            code="TC-014",
        )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's own config: of a multimodal wrapper the text config, with the wrapper's architectures.

    ``quantization_config``, ``tie_word_embeddings`` and ``dtype`` of the wrapper count when the text config
    is silent.
    """
    for key in _MULTIMODAL_KEYS:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            merged = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **inner}
            for shared in ("architectures", "quantization_config", "dtype", "torch_dtype"):
                if config.get(shared) is not None:
                    merged[shared] = config[shared]
            return merged
    return dict(config)


def need(config: Mapping[str, Any], *keys: str) -> int:
    """The first of ``keys`` that config.json holds, as a positive integer; UsageError TC-022 otherwise."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise UsageError(f"config.json: {key} is {value!r}, expected a positive integer", code="TC-022")
        return value
    raise UsageError(
        f"config.json lacks {' or '.join(keys)}",
        hint="planning needs the dimensions of the decoder: add the key with the value of the model",
        code="TC-022",
    )


def attention_of(config: Mapping[str, Any]) -> Attention:
    """Geometry of the KV cache. Layers of linear attention keep a state of fixed size and are not counted."""
    layers, heads = need(config, "num_hidden_layers"), need(config, "num_attention_heads")
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        layers = sum("linear" not in str(kind) for kind in kinds)
    if config.get("kv_lora_rank"):
        rope = need(config, "qk_rope_head_dim")
        return Attention(
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=need(config, "qk_nope_head_dim") + rope,
            kv_elements_per_token_per_layer=need(config, "kv_lora_rank") + rope,
        )
    kv_heads = need(config, "num_key_value_heads", "num_attention_heads")
    head_dim = need(config, "head_dim") if config.get("head_dim") else need(config, "hidden_size") // heads
    return Attention(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        kv_elements_per_token_per_layer=2 * kv_heads * head_dim,
    )


def config_dtype(config: Mapping[str, Any]) -> str:
    """Safetensors name of config.json's ``dtype`` (once ``torch_dtype``); F32 when it is silent."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    if name not in names:
        raise ToolchainError(
            f"config.json: dtype is {name!r}, expected one of {', '.join(names)}", code="TC-022"
        )
    return names[name]
