"""config.json of a TensorRT-LLM checkpoint: ``PretrainedConfig`` of ``models/modeling_utils.py`` (1.2), with the fields
that ``models/llama/config.py`` and ``models/qwen/config.py`` add.

A list of excluded modules replaces TensorRT-LLM's own (``quantization/quantize.py``: lm_head, router, embeddings,
shared_expert_gate), so these are always in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.build.tensorrt.decoder import Decoder
from toolchain.build.tensorrt.mapping import Parallel
from toolchain.core.errors import UsageError
from toolchain.formats.base import Format
from toolchain.models.config import config_dtype
from toolchain.targets.tensorrt import LEGACY_MODELS

NEVER_QUANTIZED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding")
SHARED_GATE = "*shared_expert_gate"
NONE, RENORMALIZE = 0, 1
"""``MoeConfig.ExpertScaleNormalizationMode`` (``layers/moe.py``)."""
GROUP_SIZES = ("W4A16_AWQ", "W4A8_AWQ", "NVFP4")
DTYPES = {"BF16": "bfloat16", "F16": "float16"}


def model_dtype(config: Mapping[str, Any]) -> str:
    """``dtype`` of the engine. UsageError for float32 models: the plugins compute in 16 bits."""
    name = config_dtype(config)
    if name not in DTYPES:
        raise UsageError(
            f"the model's dtype is {name}; a TensorRT engine needs bfloat16 or float16",
            hint="set dtype in its config.json, or use --target trtllm",
            code="TC-420",
        )
    return DTYPES[name]


def pretrained_config(
    decoder: Decoder, architecture: str, parallel: Parallel, format: Format | None, producer: str
) -> dict[str, Any]:
    """The content of config.json. ``producer``: version of ModelOpt that made the numbers."""
    config, attention = decoder.config, decoder.attention
    is_moe = bool(decoder.model.moe_parent)
    made: dict[str, Any] = {
        "producer": {"name": "modelopt", "version": producer},
        "architecture": architecture,
        "dtype": model_dtype(config),
        "logits_dtype": "float32",
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_size": attention.head_dim,
        "hidden_size": config["hidden_size"],
        "intermediate_size": _intermediate_size(decoder),
        "norm_epsilon": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        # The hub's MLPs are gated by themselves; the MoE layer has to be told (swiglu).
        "hidden_act": "swiglu" if is_moe else config.get("hidden_act", "silu"),
        "position_embedding_type": "rope_gpt_neox",
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "qk_layernorm": decoder.model.qk_norm,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "attn_bias": _attention_bias(decoder),
        **_rotary(config),
        "mapping": parallel.to_json(is_moe=is_moe),
        "quantization": _quantization(decoder, parallel, format),
    }
    if decoder.model.config == "qwen":
        made |= _qwen(decoder)
    if is_moe:
        made |= {"moe": _moe(decoder)}
    return made


def _intermediate_size(decoder: Decoder) -> int:
    """Of Qwen's mixtures the size of one expert, as ModelOpt's exporter writes it: whichever of the two keys
    ``models/qwen/model.py`` of a release asks for, the answer is the same."""
    config = decoder.config
    of_qwen_experts = decoder.model.config == "qwen" and decoder.model.moe_parent
    return int(config["moe_intermediate_size" if of_qwen_experts else "intermediate_size"])


def _attention_bias(decoder: Decoder) -> bool:
    if decoder.model.config == "qwen":
        return decoder.model.qwen_type in ("qwen2", "qwen2_moe")
    return bool(decoder.config.get("attention_bias", False))


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rotary_base`` and ``rotary_scaling``, from config.json as transformers 4 or 5 writes it."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rest = {key: value for key, value in scaling.items() if key not in ("rope_theta", "rope_type", "type")}
    # Both spellings of its kind: releases differ in which one they ask for.
    rotary_scaling = None if kind == "default" else {"type": kind, "rope_type": kind, **rest}
    return {"rotary_base": base, "rotary_scaling": rotary_scaling, "rotary_pct": 1.0}


def _qwen(decoder: Decoder) -> dict[str, Any]:
    config = decoder.config
    return {
        "qwen_type": decoder.model.qwen_type,
        "seq_length": config.get("seq_length", 8192),
        "moe_intermediate_size": config.get("moe_intermediate_size", 0),
        "moe_shared_expert_intermediate_size": config.get("shared_expert_intermediate_size", 0),
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _moe(decoder: Decoder) -> dict[str, Any]:
    """Mixtral always renormalizes the weights of the chosen experts; Qwen when its config says so."""
    config = decoder.config
    renormalizes = decoder.model.config == "llama" or bool(config.get("norm_topk_prob", False))
    return {
        "num_experts": decoder.num_experts,
        "top_k": config["num_experts_per_tok"],
        "normalization_mode": RENORMALIZE if renormalizes else NONE,
    }


def _quantization(decoder: Decoder, parallel: Parallel, format: Format | None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "quant_algo": format.quant_algo if format else None,
        "kv_cache_quant_algo": decoder.kv_algo,
    }
    if format and format.quant_algo in GROUP_SIZES:
        made["group_size"] = format.group_size
    if format and format.quant_algo in ("W4A16_AWQ", "W4A8_AWQ"):
        made |= {"has_zero_point": False, "pre_quant_scale": True}
    made["exclude_modules"] = _excluded(decoder, parallel)
    return made


def _excluded(decoder: Decoder, parallel: Parallel) -> list[str]:
    """Patterns for ``fnmatch`` of modules that keep their dtype: of a whole role, or layer by layer on one stage."""
    patterns = [*NEVER_QUANTIZED]
    if decoder.model.qwen_type == "qwen2_moe":
        patterns.append(SHARED_GATE)
    for name, stored in _kinds(decoder):
        plain = [
            layer
            for layer in range(decoder.num_layers)
            if decoder.format_of(f"model.layers.{layer}.{stored}") is None
        ]
        if len(plain) == decoder.num_layers:
            patterns.append(f"*{name}")
        elif plain and parallel.pp > 1:
            raise UsageError(
                f"{name} is quantized in some layers only: with pp={parallel.pp} its checkpoint cannot say in which",
                hint="use --pp 1",
                code="TC-420",
            )
        else:
            patterns += [f"transformer.layers.{layer}.{name}" for layer in plain]
    return patterns


def _kinds(decoder: Decoder) -> list[tuple[str, str]]:
    """(module of a TensorRT layer, checkpoint module that tells its format). A MoE layer is excluded as a whole."""
    kinds = [("attention.qkv", "self_attn.q_proj"), ("attention.dense", "self_attn.o_proj")]
    parent = decoder.model.moe_parent
    if not parent:
        mlp = (("fc", "gate_proj"), ("gate", "up_proj"), ("proj", "down_proj"))
        return [*kinds, *((f"mlp.{new}", f"mlp.{old}") for new, old in mlp)]
    kinds.append(("mlp", f"{parent}.experts.0.{decoder.family.gate_up_down[0]}"))
    if decoder.model.qwen_type == "qwen2_moe":
        shared = (("fc", "gate_proj"), ("proj", "down_proj"))
        kinds += [(f"mlp.shared_expert.{new}", f"mlp.shared_expert.{old}") for new, old in shared]
    return kinds


def known_model(architecture: str) -> None:
    """UsageError TC-420 for a model whose checkpoint is not written here."""
    if architecture not in LEGACY_MODELS:
        raise UsageError(
            f"no TensorRT-LLM checkpoint is written for {architecture}",
            hint=f"known: {', '.join(LEGACY_MODELS)}; --target trtllm loads the unified checkpoint",
            code="TC-420",
        )
