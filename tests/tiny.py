"""Tiny random models of each family in the layout of the hub, for tests: a few hundred kilobytes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = dict(
    vocab_size=320, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
MLA: dict[str, Any] = dict(
    q_lora_rank=128, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, num_key_value_heads=4,
    moe_intermediate_size=128, intermediate_size=256, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        dict(head_dim=32, intermediate_size=256, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2,
             norm_topk_prob=True),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(intermediate_size=256, moe_intermediate_size=128, shared_expert_intermediate_size=128, num_experts=4,
             num_experts_per_tok=2),
    ),
    "mixtral": ("Mixtral", dict(intermediate_size=256, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek_v2": ("DeepseekV2", {**MLA, "topk_method": "greedy", "head_dim": 32}),
    "deepseek_v3": ("DeepseekV3", MLA),
    "glm4_moe": (
        "Glm4Moe",
        dict(head_dim=32, intermediate_size=256, moe_intermediate_size=128, n_routed_experts=4, n_shared_experts=1,
             num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1, use_qk_norm=True),
    ),
    "gpt_oss": (
        "GptOss",
        dict(head_dim=32, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, sliding_window=64),
    ),
    "llama4_text": (
        "Llama4",
        dict(head_dim=32, intermediate_size=128, intermediate_size_mlp=256, num_local_experts=4,
             num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=128),
    ),
    "minimax": (
        "MiniMax",
        dict(head_dim=32, intermediate_size=256, num_local_experts=4, num_experts_per_tok=2,
             layer_types=["full_attention", "full_attention"]),
    ),
    "llama": ("Llama", dict(intermediate_size=256)),
    "qwen3": ("Qwen3", dict(head_dim=32, intermediate_size=256)),
    "mistral": ("Mistral", dict(intermediate_size=256, sliding_window=None)),
}  # fmt: skip
DENSE = ("llama", "qwen3", "mistral")


def make_tiny(kind: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random bf16 model of ``kind`` with a byte-level tokenizer to ``directory`` and return it."""
    import torch
    import transformers

    prefix, settings = KINDS[kind]
    suffix = "TextConfig" if kind == "llama4_text" else "Config"
    config = getattr(transformers, f"{prefix}{suffix}")(**{**COMMON, **settings, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def make_llama4_wrapper(directory: Path) -> Path:
    """Llama 4 as every release is: a decoder, a vision tower and a projector."""
    import torch
    import transformers

    vision = dict(
        vision_output_dim=64, projector_input_dim=64, projector_output_dim=64, image_size=28, patch_size=14
    )
    config = transformers.Llama4Config(
        text_config={**COMMON, **KINDS["llama4_text"][1]},
        vision_config=dict(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, **vision
        ),
    )
    torch.manual_seed(0)
    model = transformers.Llama4ForConditionalGeneration(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def make_fp8_source(source: Path, directory: Path, *, block: int = 128) -> Path:
    """``source`` with its Linears in blocks of E4M3, as DeepSeek-V3 is published: amax / 448 per block, F32."""
    import torch
    from safetensors.torch import load_file

    tensors, written = load_file(source / "model.safetensors"), {}
    for name, tensor in tensors.items():
        kept = tensor.dim() != 2 or any(
            part in name for part in ("embed", "lm_head", "norm", "mlp.gate.", "router")
        )
        if kept:
            written[name] = tensor
            continue
        rows, columns = (-(-size // block) for size in tensor.shape)
        scales, codes = torch.ones(rows, columns), torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for column in range(columns):
                cut = (slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
                scales[row, column] = tensor[cut].float().abs().max() / 448
                codes[cut] = (tensor[cut].float() / scales[row, column]).to(torch.float8_e4m3fn)
        written |= {name: codes, f"{name}_scale_inv": scales}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return _write_source(source, directory, written, {**quantization, "weight_block_size": [block, block]})


def make_mxfp4_source(source: Path, directory: Path) -> Path:
    """``source`` (a tiny gpt-oss) with its experts in MXFP4, as it is published: scales 2^(floor(log2 amax) - 2)."""
    import torch
    from safetensors.torch import load_file

    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    tensors, written = load_file(source / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            written[name] = tensor
            continue
        blocks = tensor.float().transpose(1, 2).contiguous().unflatten(-1, (-1, 32))
        exponent = torch.log2(blocks.abs().amax(-1)).floor() - 2
        scaled = blocks / torch.exp2(exponent).unsqueeze(-1)
        codes = (scaled.abs().unsqueeze(-1) - values).abs().argmin(-1) + 8 * (scaled < 0)
        packed = codes[..., 0::2] + 16 * codes[..., 1::2]
        written[f"{name}_blocks"] = packed.to(torch.uint8)
        written[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return _write_source(source, directory, written, quantization)


def _write_source(
    source: Path, directory: Path, tensors: dict[str, Any], quantization: dict[str, Any]
) -> Path:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(source, directory)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return directory


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE without merges beyond bytes: 256 bytes and 4 special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "</s>",
                "chat_template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            }
        )
    )
