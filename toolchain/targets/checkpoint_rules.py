"""What each release of TensorRT-LLM reads in a checkpoint: facts with their sources, no code of the audit.

A ``Fact`` holds from ``since`` on and is known not to hold up to ``absent``; between the two nobody has looked, and the
audit says so. Dates of releases: 1.2.1 2026-04-20, 1.3.0rc20 2026-06-30, 1.3.0rc22 2026-07-22, 1.4.0rc0 2026-10-13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toolchain.targets.version import parse_version

State = Literal["yes", "no", "unverified"]
MODE = "TensorRT-LLM tensorrt_llm/quantization/mode.py"
LOADER = "TensorRT-LLM tensorrt_llm/_torch/model_config.py"
LINEAR = "TensorRT-LLM tensorrt_llm/_torch/modules/linear.py"
MOE = "TensorRT-LLM tensorrt_llm/_torch/modules/fused_moe/quantization.py"


@dataclass(frozen=True, kw_only=True)
class Fact:
    since: str = ""
    """First release known to have it; empty: none is known."""
    absent: str = ""
    """Last release known not to have it; empty: none is known."""
    never: bool = False
    """True for what no release has, so far as was looked."""
    source: str

    def state(self, version: str) -> State:
        wanted = parse_version(version)
        if self.never:
            return "no"
        if self.since and wanted >= parse_version(self.since):
            return "yes"
        return "no" if self.absent and wanted <= parse_version(self.absent) else "unverified"


_DOCS = "TensorRT-LLM gh-pages, _modules/tensorrt_llm/quantization/mode"
"""The enum as the documentation of a release has it: 1.0.0 (090dc64), 1.2.1 (58fb435), 1.3.0rc20 (f67b8b9), 1.3.0rc22
(0694d64)."""
_FIRST = Fact(since="1.0.0", source=f"{_DOCS}, 1.0.0@090dc64")
_SECOND = Fact(since="1.1.0", absent="1.0.0", source=f"{_DOCS}, 1.0.0@090dc64 lacks it")
_RC20 = Fact(since="1.3.0rc20", absent="1.2.1", source=f"{_DOCS}, 1.3.0rc20@f67b8b9; 1.2.1@58fb435 lacks it")

QUANT_ALGOS: dict[str, Fact] = {
    **dict.fromkeys(
        (
            "W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W8A16_GPTQ", "W4A16_GPTQ", "W8A8_SQ_PER_CHANNEL",
            "W8A8_SQ_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
            "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", "W4A8_QSERVE_PER_GROUP",
            "W4A8_QSERVE_PER_CHANNEL", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "INT8",
            "MIXED_PRECISION", "NVFP4", "W4A8_MXFP4_FP8", "NO_QUANT",
        ),
        _FIRST,
    ),
    **dict.fromkeys(("W4A8_NVFP4_FP8", "W4A8_MXFP4_MXFP8", "W4A16_MXFP4"), _SECOND),
    **dict.fromkeys(("MXFP8", "NVFP4_AWQ", "NVFP4_ARC"), _RC20),
    "W4A16_NVFP4": Fact(
        since="1.3.0rc22", absent="1.3.0rc20",
        source=f"{_DOCS}, 1.3.0rc22@0694d64; 1.3.0rc20@f67b8b9 lacks it; pull request 15703",
    ),
    "NVFP4_SVD": Fact(absent="1.3.0rc22", source=f"{_DOCS}, 1.3.0rc22@0694d64 lacks it"),
}  # fmt: skip
"""Members of the strict enum ``QuantAlgo``: any other string raises. What is in no line is in no release."""

ALGO_ALIASES: dict[str, str] = {"fp8_pb_wo": "FP8_BLOCK_SCALES"}
"""Other spellings that the loader translates. Upper case ``FP8_PB_WO`` is not one of them."""

KV_ALGOS = ("FP8", "INT8", "NVFP4")
"""``KV_CACHE_QUANT_ALGO_LIST``, the same in every copy of mode.py."""

LEGACY_FILE = Fact(since="1.0.0", source=LOADER)
FLAT = Fact(
    since="1.3.0rc20", absent="1.2.1",
    source="pull request 14088 (reviewed 2026-05-16, merged); before, the loader asks for the key `quantization`, and "
    "9267, which was meant for 1.2, was closed",
)  # fmt: skip
"""The flat shape, in hf_quant_config.json or alone in config.json."""
FLAT_KV: dict[str, Fact] = {
    "FP8": FLAT,
    "NVFP4": Fact(since="1.3.0rc22", absent="1.2.1", source=f"{LOADER}; the first version read FP8 only"),
    "INT8": Fact(since="1.3.0rc22", absent="1.2.1", source=f"{LOADER}; the first version read FP8 only"),
}
"""``kv_cache_scheme`` of the flat shape; what is not understood is dropped with a warning in the log."""
LAYERS_IN_FILE = Fact(
    since="1.3.0rc20", absent="1.0.0",
    source=f"{LOADER}: quantized_layers of MIXED_PRECISION from hf_quant_config.json; earlier copies open "
    "quant_cfg.json and fail without it",
)  # fmt: skip
COMPRESSED: dict[str, Fact] = {
    "FP8_PER_CHANNEL_PER_TOKEN": Fact(since="1.3.0rc20", absent="1.1.0", source="pull request 10796 (January 2026)"),
    "FP8_BLOCK_SCALES": Fact(since="1.3.0rc20", absent="1.1.0", source="pull request 10796 (January 2026)"),
    "NVFP4": Fact(since="1.3.0rc22", absent="1.2.1", source="pull requests 13559 and 14468 (May 2026)"),
}  # fmt: skip
"""``quant_method: compressed-tensors``, by the algorithm that it becomes; others are not read."""

NEEDS_PRE_QUANT_SCALE = ("W4A16_AWQ", "W4A8_AWQ")
"""Linears that are not fused read ``pre_quant_scale`` by its key (``linear.py``): o_proj and down_proj must have one.
Those of q/k/v and gate/up are folded into the norm before them and may be absent."""
MODEL_DTYPE_PRE_QUANT_SCALE = ("W4A8_AWQ",)
"""``pre_quant_scale`` must have the dtype of the model there (``linear.py``)."""
EXPERTS_NEED_PRE_QUANT_SCALE = ("W4A8_AWQ",)
"""Every expert has one (``fused_moe/quantization.py``)."""
OUTLIER_EXPERT = 64.0
"""Experts of a layer share the largest ``input_scale``. E4M3 keeps full precision over 448 / 2**-6, 15 powers of two;
an expert whose own range is 64 times smaller has lost 6 of them."""
