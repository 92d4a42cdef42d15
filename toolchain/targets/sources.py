"""Where the rows of the tables come from: documents of TensorRT-LLM, each at one commit or release."""

from __future__ import annotations

_REPOSITORY = "https://github.com/NVIDIA/TensorRT-LLM"
_MOE = "tensorrt_llm/_torch/modules/fused_moe"

HARDWARE = "TensorRT-LLM docs/source/features/quantization.md"

# The documentation of each release, as the branch gh-pages has it: features/quantization.md, "Hardware Support Matrix".
MATRIX_1_0 = "TensorRT-LLM gh-pages@090dc64, 1.0.0/features/quantization"
MATRIX_1_1 = "TensorRT-LLM gh-pages@8660c11, 1.1.0/features/quantization"
MATRIX_1_2 = "TensorRT-LLM gh-pages@58fb435, 1.2.1/features/quantization"
MATRIX_1_3 = "TensorRT-LLM gh-pages@bf0ee2f, 1.3.0rc29/features/quantization"
DEEPSEEK_1_0 = "TensorRT-LLM gh-pages@090dc64, 1.0.0/deployment-guide, DeepSeek-R1"
DEEPSEEK_1_2 = "TensorRT-LLM gh-pages@58fb435, 1.2.1/deployment-guide, DeepSeek-R1"
DEEPSEEK_1_3 = "TensorRT-LLM gh-pages@bf0ee2f, 1.3.0rc29/deployment-guide, DeepSeek-R1"
GPT_OSS_1_2 = "TensorRT-LLM gh-pages@58fb435, 1.2.1/deployment-guide, gpt-oss"
LLM_ARGS_1_0 = "TensorRT-LLM gh-pages@090dc64, 1.0.0/_modules/tensorrt_llm/llmapi/llm_args"
LLM_ARGS_1_1 = "TensorRT-LLM gh-pages@8660c11, 1.1.0/_modules/tensorrt_llm/llmapi/llm_args"
LLM_ARGS_1_2 = "TensorRT-LLM gh-pages@58fb435, 1.2.1/_modules/tensorrt_llm/llmapi/llm_args"

LINEAR = "TensorRT-LLM tensorrt_llm/_torch/modules/linear.py@00bbf71"
CREATE_MOE = f"TensorRT-LLM {_MOE}/create_moe.py@01f8de5"
MOE_GUIDE = f"TensorRT-LLM {_MOE}/MOE_DEVELOPER_GUIDE.md@04c2347 (August 2026)"
MOE_GUIDE_1_4 = (
    "TensorRT-LLM tensorrt_llm/_torch/moe/fused_moe/MOE_DEVELOPER_GUIDE.md@00b8228 (after August 2026)"
)
LITERAL_1_3 = "nvidia.github.io/TensorRT-LLM/1.3.0rc27/llm-api/reference/MoeConfig.html"

_NOTES = "TensorRT-LLM docs/source/release-notes.md@001eaec"
NOTES_1_0, NOTES_1_1, NOTES_1_2 = (f"{_NOTES}, release {line}" for line in ("1.0", "1.1", "1.2"))
NOTES_PAGE = f"{_REPOSITORY}/blob/main/docs/source/release-notes.md"


def pull(number: int) -> str:
    """A pull request as a source."""
    return f"TensorRT-LLM pull request {number}"


def issue(number: int) -> str:
    """The address of an issue."""
    return f"{_REPOSITORY}/issues/{number}"


def pull_link(number: int) -> str:
    """The address of a pull request."""
    return f"{_REPOSITORY}/pull/{number}"


def discussion(number: int) -> str:
    """The address of a discussion."""
    return f"{_REPOSITORY}/discussions/{number}"


def notes(version: str) -> str:
    """The address of a release's notes."""
    return f"{_REPOSITORY}/releases/tag/v{version}"
