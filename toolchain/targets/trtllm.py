"""TensorRT-LLM's PyTorch backend: the LLM API, trtllm-serve and Triton's llmapi.

What it supports stands in one file for each release line (``line_1_2.py``): a new line is one file and one entry in
``LINES``.
"""

from __future__ import annotations

from toolchain.families.base import Family
from toolchain.formats.base import Format
from toolchain.targets.architectures import ADA, AMPERE, BLACKWELL, BLACKWELL_RTX, HOPPER
from toolchain.targets.backends import NO_WISH, BackendState, Wish, backend_states, choose_backend
from toolchain.targets.base import Mixed, Target
from toolchain.targets.line import Line
from toolchain.targets.line_1_0 import LINE_1_0
from toolchain.targets.line_1_1 import LINE_1_1
from toolchain.targets.line_1_2 import LINE_1_2
from toolchain.targets.line_1_3 import LINE_1_3
from toolchain.targets.line_1_4 import LINE_1_4
from toolchain.targets.sources import HARDWARE

LINES: tuple[Line, ...] = (LINE_1_0, LINE_1_1, LINE_1_2, LINE_1_3, LINE_1_4)

TRTLLM = Target(
    name="trtllm",
    title="TensorRT-LLM, PyTorch backend (LLM API, trtllm-serve, Triton llmapi)",
    default_version="1.2.1",
    versions=tuple(version for line in LINES for version in line.versions),
    lines=LINES,
    dense_because="the Linears and MoE backends of TensorRT-LLM's PyTorch backend are dense, and its LLM API has no "
    "switch for sparse weights",
    mixed=Mixed(
        families=("deepseek",),
        since="1.3.0rc29",
        broken_until="1.3.0rc20",
        reason="the loader gives the experts the config of the whole checkpoint, which says MIXED_PRECISION: it "
        "allocates them in BF16 and fails, or refuses the config as ambiguous",
        source="TensorRT-LLM pull requests 15485; for DeepSeek 11215 (1.3.0rc7) and 18393 (merged after 2026-08-28)",
    ),
)

REASONS: dict[tuple[str, str], str] = {
    ("int4_awq", "moe"): "no MoE backend of TensorRT-LLM has W4A16_AWQ kernels",
    ("int4_gptq", "moe"): "no MoE backend of TensorRT-LLM has kernels for INT4 weights with BF16 activations",
    ("fp8_per_channel_per_token", "moe"): "no MoE backend of TensorRT-LLM has row-wise FP8 kernels",
    ("int8_sq", "moe"): "no MoE backend of TensorRT-LLM has SmoothQuant kernels",
    ("int8_sq", "dense"): "SmoothQuant is not among the formats of TensorRT-LLM's PyTorch backend",
    ("mxfp4", "dense"): "TensorRT-LLM runs MXFP4 in the experts of a mixture only (gpt-oss)",
}
"""(format, model) -> why no row exists, where more is missing than a kernel for one SM."""


def moe_backends(version: str, sm: int, format: Format) -> tuple[BackendState, ...]:
    """All MoE backends of a release with what each does with ``format`` on this SM: state, reason, source."""
    return backend_states(TRTLLM, version, sm, format.name)


def moe_backend(
    version: str, sm: int, format: Format, family: Family, wish: Wish = NO_WISH
) -> tuple[str, str]:
    """(``moe_config.backend``, reason) to write into the engine arguments of a mixture-of-experts model.

    Always explicit: AUTO is a preference that may resolve differently in the next release. Raises UsageError: TC-120
    when no backend has the format on this SM, TC-129 when none does what ``wish`` asks for.
    """
    del family  # the tables speak about formats; what is known to fail for a family is ``known_bad``
    return choose_backend(TRTLLM, version, sm, format.name, wish)


__all__ = [
    "ADA",
    "AMPERE",
    "BLACKWELL",
    "BLACKWELL_RTX",
    "HARDWARE",
    "HOPPER",
    "LINES",
    "REASONS",
    "TRTLLM",
    "BackendState",
    "Wish",
    "moe_backend",
    "moe_backends",
]
