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
    "TC-336": (
        "A quantized weight is all zeros",
        "A warning. A shard that was preallocated and not written to its end looks like this; so does a pruned expert.",
    ),
    "TC-337": (
        "The input scale of one expert is far above those of its layer",
        "A warning. TensorRT-LLM takes the largest input_scale of a layer for all its experts: one that saw an outlier "
        "costs all others precision. Calibrate with more or other text.",
    ),
    "TC-338": (
        "This release of TensorRT-LLM does not know the quantization algorithm",
        "QuantAlgo is a strict enum: an unknown string raises while the config is read. As a warning: the release lies "
        "between one that lacks it and one that has it, and nobody has looked.",
    ),
    "TC-339": (
        "This release of TensorRT-LLM does not read the quantization config as it is written",
        "Releases up to 1.2.1 read hf_quant_config.json in the legacy shape; a flat or inline config is an error or is "
        "silently ignored there. MIXED_PRECISION may need quant_cfg.json.",
    ),
    "TC-340": (
        "group_size of the config is not that of the stored scales",
        "Loaders allocate scales by the config and copy the stored ones into them. Correct the config.",
    ),
    "TC-341": (
        "A compressed-tensors checkpoint that has no counterpart in ModelOpt's layout",
        "The message names the scheme. Quantize from the source, or serve it with a runtime that reads it.",
    ),
    "TC-342": (
        "A conversion would change decoded values",
        "Without --exact it is done and the difference is told: 1 / global_scale is rounded in float32.",
    ),
    "TC-343": (
        "A file of the engine differs from engine.json, or is missing",
        "A byte changed after the engine was made. Copy it again, or run `toolchain engine` again.",
    ),
    "TC-344": (
        "A file that engine.json does not know",
        "An error inside the directories that runtimes load; beside them a warning: its bytes are not covered.",
    ),
    "TC-345": (
        "No kernel of this release runs a format in this part of the model",
        "`toolchain support` lists formats by release, GPU and kind of model.",
    ),
    "TC-346": (
        "AWQ without pre_quant_scale where the runtime asks for it by name",
        "Linears that no norm stands before (o_proj, down_proj), and experts in W4A8_AWQ. Ones do where nothing was "
        "scaled.",
    ),
    "TC-347": (
        "Tensor parallelism cuts a matrix inside a block or group of scales",
        "in_features per rank must be a multiple of the group. Use fewer ranks, or expert parallelism.",
    ),
    "TC-348": (
        "A quantized matrix is further from the source than rounding can be",
        "Rounding to nearest at the stored scales moves a weight by half a step at most; this is more: codes, scales "
        "or source belong to something else. A warning under recipes that move weights on purpose (gptq, compensate), "
        "and up to twice the bound where nobody knows the recipe.",
    ),
    "TC-349": (
        "A quantized matrix is the source's but for one factor per channel",
        "A warning. AWQ and SmoothQuant move factors into neighbouring layers; the counterpart was not looked for.",
    ),
    "TC-350": (
        "A tensor that is not in the source",
        "A warning: neither the source nor quantization explains it.",
    ),
    "TC-351": (
        "A quantized matrix cannot be decoded",
        "Its tensors do not fit each other: the other findings on this module say why.",
    ),
    "TC-330": (
        "The bytes do not add up to the plan",
        "Something is missing, doubled or stored in another format.",
    ),
}
