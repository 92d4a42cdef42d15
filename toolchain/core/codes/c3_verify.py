"""Verification of the written bytes."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-301": (
        "A quantization algorithm that is not supported",
        "TensorRT-LLM's QuantAlgo is a strict list; `toolchain list formats` shows what is read and written here.",
    ),
    "TC-302": (
        "The quantization config cannot be read",
        "Expected hf_quant_config.json, or quantization_config in config.json, in ModelOpt's legacy or flat shape.",
    ),
    "TC-303": (
        "A tensor or the safetensors files are missing",
        "The checkpoint is incomplete: export it again.",
    ),
    "TC-304": (
        "The checkpoint does not fit the architecture that config.json describes",
        "Weights are missing, foreign or of another shape. config.json and the shards may be of different models.",
    ),
    "TC-305": ("An attention layer has only one of k_scale and v_scale", "Runtimes need both or neither."),
    "TC-310": (
        "A tensor that the algorithm needs is missing",
        "A quantized Linear without its scales is garbage (or NaN) at run time. Experts without input_scale are the "
        "classic case: they saw no calibration token.",
    ),
    "TC-311": ("A tensor has the wrong dtype", "The runtime would reinterpret the bytes. Export again."),
    "TC-312": (
        "A tensor has the wrong shape",
        "Half-size scales and unpacked weights look like this. Export again.",
    ),
    "TC-313": (
        "A tensor that does not belong there",
        "Leaked quantizer state, or scales of a weight that is plain.",
    ),
    "TC-314": (
        "A scale or weight is not finite, or a scale is not positive",
        "One such value makes the outputs NaN for the prompts that reach it. Calibrate again.",
    ),
    "TC-315": (
        "The config calls a quantized module unquantized",
        "The runtime would read packed bytes as floats.",
    ),
    "TC-316": (
        "An unquantized module is not in exclude_modules",
        "The runtime would build a quantized layer for it and fail, or read floats as packed numbers. Routers of "
        "transformers 5 models are the classic case.",
    ),
    "TC-317": (
        "A pattern of exclude_modules matches nothing",
        "A wrong prefix: the module that was meant is then treated as quantized.",
    ),
    "TC-318": (
        "A routed expert is missing",
        "Every expert that config.json promises must be in the checkpoint.",
    ),
    "TC-319": (
        "A tensor of the architecture is missing, or a foreign one is there",
        "Export again from the source.",
    ),
    "TC-320": (
        "transformers cannot build this architecture",
        "The audit then checks experts by count, without the exact shapes.",
    ),
    "TC-321": ("A router, norm, embedding or lm_head is quantized", "These parts must keep their dtype."),
    "TC-322": (
        "The experts of one layer have different formats",
        "Runtimes run all experts of a layer in one kernel.",
    ),
    "TC-323": (
        "hf_quant_config.json and config.json disagree",
        "Different runtimes read different ones. Write both from one source.",
    ),
    "TC-324": (
        "KV cache scales are incomplete or unannounced",
        "Both scales in every layer, and kv_cache_quant_algo.",
    ),
    "TC-325": (
        "Scales differ where the runtime fuses matmuls",
        "q/k/v and gate/up run as one matmul with one scale: the other member's weights would be wrong by the ratio. "
        "For per-tensor FP8 runtimes take the larger scale and requantize (a warning: a second rounding); "
        "ModelOpt's own FP8 exports look like that.",
    ),
    "TC-326": ("A tensor of the source is missing", "The checkpoint lost a part of the model."),
    "TC-327": ("An unquantized tensor differs from the source", "Only quantized modules may change."),
    "TC-328": ("Nothing is quantized", "The config claims an algorithm that no tensor has."),
    "TC-329": ("A module is not stored in its planned format", "The classic case: experts left in BF16."),
    "TC-335": (
        "Matrices that runtimes run as one matmul are stored in several formats",
        "q/k/v and gate/up need one format each: runtimes ask for that of the first and take it for all.",
    ),
    "TC-330": (
        "The bytes do not add up to the plan",
        "Something is missing, doubled or stored in another format.",
    ),
}
