"""Building engine bundles."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-401": (
        "The checkpoint has no plan.json",
        "A build takes its limits and parallelism from the plan of the checkpoint. Quantize with this toolchain, or "
        "give the limits as options.",
    ),
    "TC-402": (
        "The checkpoint failed its audit",
        "Nothing is built from a checkpoint that `toolchain verify` rejects. Each finding says what is wrong.",
    ),
    "TC-403": (
        "The target cannot build this engine",
        "`toolchain support` shows which formats run on which GPU and release.",
    ),
    "TC-420": (
        "No TensorRT-LLM checkpoint can be written of this checkpoint",
        "Target tensorrt knows few model classes and one format per checkpoint. Use --target trtllm.",
    ),
    "TC-421": (
        "Matrices that TensorRT fuses disagree on a scale",
        "One matmul has one scale. Quantize again with this toolchain, which gives them one.",
    ),
    "TC-422": (
        "trtllm-build failed",
        "The last lines of its log are shown; the whole log stays beside the engine directory.",
    ),
    "TC-423": (
        "Releases of TensorRT-LLM, or GPUs, do not match",
        "An engine is built and served by one release, on one kind of GPU. versions.lock.json names both.",
    ),
    "TC-424": (
        "The TensorRT engine is not built yet",
        "trtllm_build.json in the engine directory has the command for NVIDIA's container.",
    ),
    "TC-425": (
        "trtllm-build of that release does not take this",
        "The flags are recorded by release in toolchain/build/tensorrt/flags.py.",
    ),
}
