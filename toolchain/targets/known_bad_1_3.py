"""Known issues of the 1.3 candidates, as their release notes have them.

A candidate's notes list what was known when it was made. ``until`` is the next candidate whose notes leave the issue
out; the notes of 1.4.0rc1 list none of these.
"""

from __future__ import annotations

from toolchain.targets.architectures import B300, BLACKWELL, HOPPER, RTX
from toolchain.targets.known_bad import KnownBad
from toolchain.targets.sources import notes, pull_link

KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        what="DeepSeek-V3.2 stops with an illegal memory access in long runs with the CuteDSL MoE backend",
        link=notes("1.3.0rc18"),
        instead="another moe_config.backend, or a later candidate",
        since="1.3.0rc18",
        until="1.3.0rc19",
        sms=BLACKWELL,
        families=("deepseek",),
        backends=("CUTEDSL",),
    ),
    KnownBad(
        what="DeepSeek-V3 and V3.2 can stop with an illegal memory access, or hang, while warming up",
        link=notes("1.3.0rc20"),
        instead="TensorRT-LLM 1.2.1 or >= 1.3.0rc22",
        since="1.3.0rc20",
        until="1.3.0rc21",
        families=("deepseek",),
    ),
    KnownBad(
        what="autotuning of Qwen3 models can stop with `Failed to initialize cutlass TMA WS grouped gemm`",
        link=notes("1.3.0rc20"),
        instead="TensorRT-LLM 1.2.1 or >= 1.3.0rc22",
        since="1.3.0rc20",
        until="1.3.0rc21",
        families=("qwen3_moe",),
        backends=("CUTLASS",),
    ),
    KnownBad(
        what="DeepSeek-V3.2 in NVFP4 over several B300 fails accuracy tests",
        link=notes("1.3.0rc21"),
        instead="TensorRT-LLM 1.2.1 or a later candidate, and an accuracy test",
        since="1.3.0rc21",
        until="1.3.0rc22",
        sms=(B300,),
        formats=("nvfp4",),
        families=("deepseek",),
        min_ranks=2,
    ),
    KnownBad(
        what="DeepSeek models in NVFP4 can run out of memory on RTX PRO 6000",
        link=notes("1.3.0rc21"),
        instead="a smaller --max-num-tokens, or a later candidate",
        since="1.3.0rc21",
        until="1.3.0rc22",
        sms=(RTX,),
        formats=("nvfp4",),
        families=("deepseek",),
    ),
    KnownBad(
        what="Qwen3 mixtures of experts may fail at start in FP8 by blocks on Blackwell",
        link=notes("1.3.0rc24"),
        instead="nvfp4 or fp8, or TensorRT-LLM 1.2.1",
        since="1.3.0rc23",
        until="1.4.0rc0",
        sms=BLACKWELL,
        formats=("fp8_block",),
        families=("qwen3_moe",),
        model="moe",
    ),
    KnownBad(
        what="gpt-oss with 4-bit weights over several GPUs can lose much accuracy (fused residual norm and all-reduce)",
        link=notes("1.3.0rc24"),
        instead="one GPU, or another release, and an accuracy test",
        since="1.3.0rc23",
        until="1.4.0rc0",
        formats=("mxfp4",),
        families=("gpt_oss",),
        min_ranks=2,
    ),
    KnownBad(
        what="MARLIN with expert or attention data parallelism came with pull request 16597 (after 2026-07-20)",
        link=pull_link(16597),
        instead="--ep 1 without --attention-dp, or TensorRT-LLM >= 1.3.0rc29",
        until="1.3.0rc29",
        sms=HOPPER,
        formats=("nvfp4", "w4a16_nvfp4"),
        model="moe",
        backends=("MARLIN",),
        min_ep=2,
    ),
)
