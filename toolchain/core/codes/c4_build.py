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
    "TC-404": (
        "An argument that this release of TensorRT-LLM does not have",
        "Its LLM API refuses unknown keys. Arguments by release, with their sources, are recorded in "
        "toolchain/build/llmapi/data.",
    ),
    "TC-405": (
        "An argument of TensorRT-LLM's LLM API with a value that it does not take",
        "The finding says which type or words that release expects.",
    ),
    "TC-406": (
        "The arguments of this release of TensorRT-LLM could not be read",
        "They are checked as those of the nearest older release that could be. What is new in it is not known here; "
        "`toolchain build --warmup` tries the arguments where TensorRT-LLM is installed.",
    ),
    "TC-407": (
        "An argument that the plan decides",
        "Parallelism, limits and the like have options of their own: memory is planned with them.",
    ),
    "TC-410": (
        "The installed TensorRT-LLM is not the one that the engine was planned for",
        "versions.lock.json of the engine names the release and its container image. Build the engine for the "
        "installed one with --trtllm-version, or use that image.",
    ),
    "TC-411": (
        "The warm-up of the engine failed",
        "warmup.log has all that TensorRT-LLM said. Nothing was recorded.",
    ),
    "TC-412": (
        "Nothing to warm up",
        "Only engines of target trtllm are loaded, tuned and tried ahead.",
    ),
}
