"""Deploying engines: Kubernetes manifests, other runtimes, NIM."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-450": (
        "That runtime does not serve this engine",
        "The message says why. trtllm-serve and Triton serve engines of target trtllm; vLLM and SGLang load some "
        "of the formats, which toolchain/deploy/README.md lists with their sources.",
    ),
    "TC-451": (
        "The GPUs of the engine do not fit that placement",
        "tp x pp GPUs are spread evenly over the nodes. Give --gpus-per-node as your nodes have them, or build the "
        "engine with another --tp or --pp.",
    ),
    "TC-452": ("Not a name that Kubernetes takes", "Lower case letters, digits and -, beginning with a letter."),
    "TC-453": (
        "No image is known for that release",
        "NVIDIA's matrix lists which TensorRT-LLM a Triton image carries; for others build one, and "
        "name it with --image.",
    ),
    "TC-460": (
        "NIM does not load this format",
        "NIM 1.x runs TensorRT-LLM, NIM 2.x vLLM or SGLang: the format must be one that the backend reads.",
    ),
    "TC-461": (
        "A file is missing that NIM reads",
        "Copy it from the source model into the engine's checkpoint, and run the command again.",
    ),
    "TC-462": (
        "The checkpoint has no chat template",
        "A warning. /v1/chat/completions needs one: chat_template.jinja, or chat_template in tokenizer_config.json.",
    ),
    "TC-463": (
        "The index and the shards of the checkpoint differ",
        "model.safetensors.index.json must name exactly the shards that are there. Fetch or write the "
        "checkpoint again.",
    ),
    "TC-464": (
        "The TensorRT-LLM inside that NIM is not known here",
        "A warning. NIM 1.x carries a TensorRT-LLM of its own; its release notes name it. Compare with target_version.",
    ),
    "TC-465": (
        "Other users cannot read a file",
        "A warning. Containers run as a user of their own: `chmod -R a+rX` the directory, or run the "
        "container as yours.",
    ),
}  # fmt: skip
