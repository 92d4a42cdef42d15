"""The local runtime and evaluation."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-501": (
        "Bad sampling parameters",
        "The message lists each parameter with the range that was expected.",
    ),
    "TC-502": (
        "The directory cannot be run",
        "Give an engine directory (engine.json and checkpoint/) or a Hugging Face checkpoint "
        "directory (config.json, safetensors, tokenizer). An engine without engine.json was not "
        "finished: run `toolchain engine` again.",
    ),
    "TC-503": (
        "The prompt was refused",
        "It must hold at least one token, leave room below max_seq_len for one more and for max_tokens where that is "
        "given, and use ids of the vocabulary.",
    ),
    "TC-504": (
        "The model failed while it generated",
        "The engine goes on with other requests. Out of memory: lower --max-batch-size or "
        "--max-seq-len. Otherwise run `toolchain verify` on the checkpoint.",
    ),
    "TC-505": (
        "The waiting queue is full",
        "Send again later, send fewer requests at a time, or run the engine with a larger batch.",
    ),
    "TC-506": (
        "The engine is closed",
        "The request came after close(), or the engine was closed while it ran.",
    ),
    "TC-507": (
        "The device is not available",
        "`toolchain doctor` shows what this machine has; --device auto takes the GPU if there is one, "
        "else the CPU.",
    ),
    "TC-508": (
        "The receiver of an answer failed",
        "The on_chunk callback raised an exception. Only its own request was ended.",
    ),
    "TC-509": (
        "Limits beyond what the engine was planned for",
        "max_batch_size and max_seq_len may be lowered when an engine is loaded; to raise them, plan "
        "and build again.",
    ),
    "TC-510": (
        "The quantized KV cache cannot be emulated",
        "Emulation rounds keys and values inside scaled_dot_product_attention. Evaluate with --emulation weights, "
        "load with emulate_activations=False, or quantize with --kv-cache none.",
    ),
    "TC-511": (
        "A message to the worker cannot be understood",
        "Messages are JSON objects, one per line; toolchain/runtime/README.md lists them.",
    ),
    "TC-516": (
        "The fused kernels cannot run these weights",
        "They multiply gate and up with one input, which must be scaled in one way. Run the engine with decoded "
        "weights: --kernels off.",
    ),
    "TC-517": (
        "The KV cache does not fit",
        "Not even one request of max_seq_len positions fits into the free memory of the GPU. Plan the engine with a "
        "lower --max-seq-len, use an FP8 KV cache, or a larger GPU.",
    ),
    "TC-518": (
        "A table of kernel settings is damaged",
        "Remove the file that the message names: the kernels are tuned again when the engine is loaded on a GPU.",
    ),
    "TC-519": (
        "Tuning broke the connection to the GPU",
        "A candidate that the message names made the GPU fail, so that nothing can be computed in this process any "
        "more. Load the engine with --kernels off, and report it.",
    ),
    "TC-512": (
        "The request waited too long",
        "It got no free row within --max-queue-s. Send again later, send fewer requests at a time, or run the engine "
        "with a larger batch.",
    ),
    "TC-513": (
        "The request's own timeout has passed",
        "Its sender gave it a timeout (Triton's request parameter `timeout`, in microseconds) and it did not end "
        "within it. Ask for fewer tokens, or give it longer.",
    ),
    "TC-514": (
        "The engine process is not running",
        "It ended and is being restarted, or the model is being unloaded. Send again; the server's log has its last "
        "words.",
    ),
    "TC-515": (
        "The request to the Triton model is not well-formed",
        "The message names the field: a missing or repeated text_input, an unknown field, a number that is not "
        "finite, a tensor with several elements where one is expected.",
    ),
    "TC-520": (
        "No text to evaluate on",
        "Give --data a text file, a JSONL or Parquet file with a `text` or `messages` field, a directory of such "
        "files, or a data set on the hub.",
    ),
    "TC-521": (
        "A line of the evaluation data cannot be read",
        'Each line of a JSONL file is an object with "text" (a string) or "messages" (role and '
        "content each).",
    ),
    "TC-522": (
        "The two checkpoints do not share a vocabulary",
        "KL and agreement compare distributions over the same tokens: give the baseline that the "
        "checkpoint was made of.",
    ),
    "TC-523": (
        "Bad evaluation settings",
        "window >= 2 tokens, 1 <= stride <= window, and at least two tokens of data.",
    ),
    "TC-526": (
        "The state of an interrupted evaluation cannot be used",
        "It holds the batches that were finished. Remove the directory that the message names: the evaluation begins "
        "anew.",
    ),
    "TC-527": (
        "The model computes what is not a number",
        "Logits with NaN or infinity have no perplexity. `toolchain verify` audits the scales; evaluate with "
        "--emulation weights to see whether it is the rounding of activations.",
    ),
    "TC-528": (
        "No prompts to generate from",
        "A file of prompts holds one per line, or is JSONL with `text` or `messages` per line.",
    ),
    "TC-525": (
        "The evaluation text was calibrated or trained on",
        "A warning: runs of 32 tokens of it stand in the calibration or training text, and figures on it "
        "flatter the checkpoint.",
    ),
    "TC-524": (
        "A data set on the hub cannot be read",
        "Check the name, the network and HF_HUB_OFFLINE; or download it and give the local file.",
    ),
    "TC-530": (
        "A gate cannot be judged",
        "Gates limit what quantization may cost: --max-kl (nats per token), --max-ppl-increase (0.01 is 1 %), "
        "--min-top1 and --min-router-agreement (0 to 1). They need held-out text and the source model, the last one a "
        "mixture of experts.",
    ),
    "TC-531": (
        "A gate was not passed",
        "The written bytes lose more than the gate allows. `toolchain sensitivity` shows where; --recipe best, "
        "--protect-first, another format or --format auto lose less.",
    ),
    "TC-532": (
        "The engine is marked as not fit to serve",
        "gates.json beside engine.json holds the gate that failed. Evaluate again with another limit, make the engine "
        "better, or say --allow-unfit.",
    ),
    "TC-533": (
        "gates.json is damaged",
        "It is written by `toolchain evaluate` and `toolchain engine` when gates are given. Evaluate again with them.",
    ),
}
