"""Command line of trtllm-build, recorded: what it takes, by release.

Read in NVIDIA/TensorRT-LLM: ``tensorrt_llm/commands/build.py`` at 65f1d15 (the last stored version, without
auto_parallel) and 008b2b8 (the one before, with it), ``tensorrt_llm/plugin/plugin.py`` (``cli_plugin_args``, its
dataclass form of 1.0 and its pydantic form of 1.1 and later: the same names). What one of them lacks is not listed, so
that the table holds for 1.0 to 1.3.0rc20.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from toolchain.core.errors import UsageError
from toolchain.targets.tensorrt import LAST
from toolchain.targets.version import parse_version

Kind = Literal["int", "text", "choice", "switch"]
FIRST = "1.0.0"
"""First release that the table was made for."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    name: str
    kind: Kind = "text"
    choices: tuple[str, ...] = ()


_PLUGIN = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
_ON_OFF = ("enable", "disable")
_INTS = (
    "max_batch_size max_input_len max_seq_len max_beam_width max_num_tokens opt_num_tokens max_encoder_input_len "
    "max_prompt_embedding_table_size workers max_lora_rank max_draft_len tokens_per_block"
)
_TEXTS = (
    "checkpoint_dir model_config build_config model_cls_file model_cls_name output_dir input_timing_cache "
    "output_timing_cache visualize_network lora_dir lora_target_modules"
)
_SWITCHES = (
    "strip_plan weight_sparsity weight_streaming fast_build enable_debug_output dry_run monitor_memory "
    "gather_context_logits gather_generation_logits gather_all_token_logits"
)
_PLUGINS = (
    "bert_attention_plugin gpt_attention_plugin fp8_rowwise_gemm_plugin lora_plugin moe_plugin mamba_conv1d_plugin "
    "nccl_plugin"
)
_FEATURES = (
    "dora_plugin context_fmha bert_context_fmha_fp32_acc remove_input_padding use_paged_context_fmha "
    "use_fp8_context_fmha fuse_fp4_quant multiple_profiles paged_state streamingllm norm_quant_fusion reduce_fusion "
    "user_buffer use_fused_mlp pp_reduce_scatter"
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "kv_cache_type": ("continuous", "paged", "disabled"),
    "profiling_verbosity": ("layer_names_only", "detailed", "none"),
    "log_level": ("internal_error", "error", "warning", "info", "verbose", "debug", "trace"),
    "logits_dtype": ("float16", "float32"),
    "lora_ckpt_source": ("hf", "nemo"),
    "speculative_decoding_mode": (
        "draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle",
    ),
    "gemm_plugin": ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable"),
    "gemm_swiglu_plugin": ("fp8", "disable"),
    "low_latency_gemm_plugin": ("fp8", "disable"),
    "low_latency_gemm_swiglu_plugin": ("fp8", "disable"),
    "gemm_allreduce_plugin": ("float16", "bfloat16", "disable"),
}  # fmt: skip

FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        *(Flag(name=name, kind="int") for name in _INTS.split()),
        *(Flag(name=name) for name in _TEXTS.split()),
        *(Flag(name=name, kind="switch") for name in _SWITCHES.split()),
        *(Flag(name=name, kind="choice", choices=_PLUGIN) for name in _PLUGINS.split()),
        *(Flag(name=name, kind="choice", choices=_ON_OFF) for name in _FEATURES.split()),
        *(Flag(name=name, kind="choice", choices=choices) for name, choices in _CHOICES.items()),
    )
}


def check_arguments(arguments: Sequence[str], version: str) -> None:
    """UsageError TC-425 unless trtllm-build of ``version`` takes these words (its name not among them)."""
    if not parse_version(FIRST) <= parse_version(version) < parse_version(LAST):
        raise UsageError(
            f"no trtllm-build is known for TensorRT-LLM {version}: from {FIRST} on, gone in {LAST}",
            hint="use --trtllm-version 1.2.1, or --target trtllm",
            code="TC-425",
        )
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag = FLAGS.get(word.removeprefix("--")) if word.startswith("--") else None
        if flag is None:
            raise _refused(word, version, "it is not among its flags")
        if flag.kind == "switch":
            continue
        if not words:
            raise _refused(word, version, "its value is missing")
        value = words.pop(0)
        if flag.kind == "int" and not value.isdigit():
            raise _refused(word, version, f"{value!r} is not a number")
        if flag.choices and value not in flag.choices:
            raise _refused(word, version, f"{value!r} is not one of {', '.join(flag.choices)}")


def _refused(word: str, version: str, why: str) -> UsageError:
    return UsageError(f"trtllm-build of TensorRT-LLM {version} does not take {word}: {why}", code="TC-425")
