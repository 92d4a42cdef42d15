"""Which stored formats vLLM and SGLang load: one row per runtime and algorithm, with its source.

Rows say what the runtime's reader of ModelOpt checkpoints takes, not which GPU has the kernels. What has no row is
refused by name: SGLang, for one, matches algorithms by the letters in them and would misread FP8 of another layout.
"""

from __future__ import annotations

from dataclasses import dataclass

VLLM_READER = "vllm: model_executor/layers/quantization/modelopt.py, QUANT_ALGOS"
SGLANG_CHOICE = "sglang: srt/configs/model_config.py, _parse_modelopt_quant_config"
SGLANG_READER = "sglang: srt/layers/quantization/modelopt_quant.py"
PUBLISHED = "gpt-oss as published: quant_method mxfp4 in config.json"


@dataclass(frozen=True, kw_only=True)
class Loads:
    runtime: str
    """``vllm`` or ``sglang``."""
    quant_algo: str
    option: str
    """Value of ``--quantization``; empty: the runtime finds it in config.json, and the option must stay away."""
    source: str
    experts: bool = True
    """Whether fused experts may be stored so, or dense layers only."""
    architectures: tuple[str, ...] = ()
    """Empty: all that the runtime knows."""
    inside_mixed: bool = False
    """Whether MIXED_PRECISION may hold it."""


def _row(runtime: str, quant_algo: str, option: str, source: str, **more: object) -> Loads:
    return Loads(runtime=runtime, quant_algo=quant_algo, option=option, source=source, **more)  # type: ignore[arg-type]


LOADS: tuple[Loads, ...] = (
    _row("vllm", "FP8", "modelopt", VLLM_READER, inside_mixed=True),
    # ModelOptFp8MoEMethod: one static scale per tensor.
    _row("vllm", "FP8_PER_CHANNEL_PER_TOKEN", "modelopt", VLLM_READER, experts=False),
    _row("vllm", "NVFP4", "modelopt_fp4", VLLM_READER, inside_mixed=True),
    _row("vllm", "W4A16_NVFP4", "modelopt_fp4", VLLM_READER, inside_mixed=True),
    _row("vllm", "MXFP8", "modelopt_mxfp8", VLLM_READER),
    _row("vllm", "MIXED_PRECISION", "modelopt_mixed", f"{VLLM_READER}; ModelOptMixedPrecisionConfig"),
    _row("vllm", "W4A16_MXFP4", "", PUBLISHED, architectures=("GptOssForCausalLM",)),
    _row("sglang", "FP8", "modelopt_fp8", f"{SGLANG_READER}, ModelOptFp8Config; {SGLANG_CHOICE}"),
    _row("sglang", "NVFP4", "modelopt_fp4", f"{SGLANG_READER}, ModelOptFp4Config; {SGLANG_CHOICE}"),
    _row("sglang", "W4A16_MXFP4", "", PUBLISHED, architectures=("GptOssForCausalLM",)),
)

REFUSED: dict[tuple[str, str], str] = {
    (
        "sglang",
        "MIXED_PRECISION",
    ): "SGLang takes MIXED_PRECISION for its W4AFP8 layout of DeepSeek, and reads "
    f"ModelOpt's for Nemotron-H only ({SGLANG_CHOICE})",
    (
        "vllm",
        "FP8_BLOCK_SCALES",
    ): "vLLM reads ModelOpt's FP8 blocks as FP8_PB_WO with scales called weight_scale and "
    "four dimensions; TensorRT-LLM's FP8_BLOCK_SCALES has weight_scale_inv",
}
"""(runtime, quant_algo) -> why, where there is more to say than that the reader does not know it."""

TITLES = {"vllm": "vLLM", "sglang": "SGLang"}


def find_row(runtime: str, quant_algo: str) -> Loads | None:
    return next((row for row in LOADS if (row.runtime, row.quant_algo) == (runtime, quant_algo)), None)


def why_not(runtime: str, *, quant_algo: str, algos: frozenset[str], architecture: str, is_moe: bool) -> str:
    """Why ``runtime`` does not load the checkpoint; empty when it does.

    ``algos``: quant_algo of every format that some part has (several under MIXED_PRECISION).
    """
    title = TITLES[runtime]
    stored = next(iter(algos)) if algos == {"W4A16_MXFP4"} else quant_algo
    row = find_row(runtime, stored)
    if row is None:
        special = REFUSED.get((runtime, stored))
        return (
            f"{special}." if special else f"{title}'s reader of ModelOpt checkpoints does not know {stored}."
        )
    if row.architectures and architecture not in row.architectures:
        return f"{title} reads MXFP4 weights of gpt-oss only."
    if is_moe and not row.experts:
        return f"{title} runs {stored} in dense layers only, not in experts."
    if stored == "MIXED_PRECISION":
        known = {each.quant_algo for each in LOADS if each.runtime == runtime and each.inside_mixed}
        unknown = algos - known
        if unknown:
            return f"{title}'s reader of ModelOpt checkpoints does not know {', '.join(sorted(unknown))}."
    return ""
