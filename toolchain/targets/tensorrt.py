"""TensorRT engines by trtllm-build: deprecated upstream, last in 1.3.0rc20. A table only."""

from __future__ import annotations

from toolchain.targets.base import Row, Target
from toolchain.targets.trtllm import ADA, AMPERE, BLACKWELL, HARDWARE, HOPPER

LAST = "1.3.0rc21"
"""First release without the TensorRT backend (release notes of v1.3.0rc20: "last one supporting" it)."""

TENSORRT = Target(
    name="tensorrt",
    title="TensorRT engines by trtllm-build (TensorRT-LLM <= 1.2.x)",
    default_version="1.2.1",
    versions=("1.0.0", "1.1.0", "1.2.0", "1.2.1", "1.3.0rc20"),
    rows=(
        Row(
            formats=("fp8",), sms=(*ADA, *HOPPER, *BLACKWELL), models=("dense",), until=LAST, source=HARDWARE
        ),
        Row(formats=("nvfp4",), sms=BLACKWELL, models=("dense",), until=LAST, source=HARDWARE),
        Row(
            formats=("int4_awq", "int4_gptq"),
            sms=(*AMPERE, *ADA, *HOPPER),
            models=("dense",),
            until=LAST,
            source=HARDWARE,
        ),
        Row(formats=("w4a8_awq",), sms=(*ADA, *HOPPER), models=("dense",), until=LAST, source=HARDWARE),
        Row(
            formats=("fp8_per_channel_per_token",),
            sms=HOPPER,
            models=("dense",),
            until=LAST,
            source=HARDWARE,
        ),
        Row(
            formats=("int8_sq", "int8_wo"),
            sms=(*AMPERE, *ADA, *HOPPER),
            models=("dense",),
            until=LAST,
            source="TensorRT-LLM docs/source/legacy/architecture/checkpoint.md",
        ),
    ),
    kv_rows=(
        Row(
            formats=("fp8", "fp8_cast"), sms=(*AMPERE, *ADA, *HOPPER, *BLACKWELL), until=LAST, source=HARDWARE
        ),
    ),
    deprecated="TensorRT-LLM removed trtllm-build after 1.3.0rc20; --target trtllm loads the same checkpoint",
    refuses="this toolchain does not build TensorRT engines yet",
)
