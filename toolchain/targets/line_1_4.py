"""TensorRT-LLM 1.4 (candidates, from October 2026). Its MoE code moved to ``tensorrt_llm/_torch/moe``."""

from __future__ import annotations

from toolchain.targets.architectures import BLACKWELL
from toolchain.targets.line import Line
from toolchain.targets.line_1_3 import LINE_1_3
from toolchain.targets.rows import moe
from toolchain.targets.sources import MOE_GUIDE_1_4

LINE_1_4 = Line(
    name="1.4",
    versions=("1.4.0rc0", "1.4.0rc1"),
    before=LINE_1_3,
    rows=(
        moe(
            "CUTLASS",
            "mxfp8",
            BLACKWELL,
            MOE_GUIDE_1_4,
            preferred=True,
            state="limited",
            note="the hardware matrix does not list it",
        ),
    ),
    backends=LINE_1_3.backends,
    backends_source=f"{LINE_1_3.backends_source}; {MOE_GUIDE_1_4}",
    eplb=LINE_1_3.eplb,
    eplb_source=f"{LINE_1_3.eplb_source}; {MOE_GUIDE_1_4}",
)
