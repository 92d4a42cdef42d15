"""Planning."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-100": (
        "The plan has errors",
        "Each finding says what was found and what would work. Change the request.",
    ),
    "TC-101": ("Unknown format", "`toolchain list formats` shows what exists."),
    "TC-102": ("Unknown GPU", "`toolchain list gpus` shows what exists."),
    "TC-103": ("Unknown target", "`toolchain list targets` shows what exists."),
    "TC-104": ("Unknown policy", "experts-only, mlp-only or all-linear; without one, the format chooses."),
    "TC-105": (
        "A limit is below 1",
        "max_batch_size, max_seq_len, max_num_tokens, tp, ep and pp count from 1.",
    ),
    "TC-106": (
        "A release number is malformed, or outside of the support tables",
        "Use the form of the package index, such as 1.2.1 or 1.3.0rc20; `toolchain support` "
        "lists known releases.",
    ),
    "TC-107": ("Unknown KV cache format", "none keeps the model's dtype; fp8 stores E4M3."),
    "TC-108": (
        "A recipe that does not exist, contradicts itself or does not apply to the format",
        "`toolchain list recipes` shows each ingredient and its formats; `best` is what was measured best.",
    ),
    "TC-110": (
        "A matrix does not fit the format",
        "Block formats need in_features in whole groups. Choose a policy that leaves the "
        "part out, or another format.",
    ),
    "TC-111": (
        "Tensor parallelism cuts a width into pieces that do not fit",
        "Each rank's piece must be whole and a multiple of the format's group. Use a smaller "
        "--tp, or --ep for experts.",
    ),
    "TC-112": (
        "Attention heads do not divide over tp",
        "num_attention_heads must divide by tp; KV heads must divide by tp, or tp by them "
        "(they are then replicated).",
    ),
    "TC-113": (
        "Experts do not divide over ep",
        "The number of experts must divide by ep, and tp by ep: TensorRT-LLM keeps moe_tp * moe_ep = tp.",
    ),
    "TC-114": (
        "Layers do not divide over pp",
        "More ranks than layers is an error; an uneven split is a warning.",
    ),
    "TC-115": ("The target runs on one device", "Leave tp, ep and pp at 1, or choose --target trtllm."),
    "TC-116": (
        "The attention has no place for KV cache scales",
        "MLA and linear attention have no k_proj and v_proj to store them beside: use --kv-cache none.",
    ),
    "TC-117": (
        "An option of serving has no effect on this model or target",
        "Attention data parallelism, expert load balancing and LLM arguments are for --target trtllm; the finding says "
        "what would be left of the others.",
    ),
    "TC-118": (
        "Expert load balancing does not work out",
        "--eplb-slots needs at least one slot for each expert, and the same number on every rank of --ep.",
    ),
    "TC-119": (
        "Prompts are cut shorter than max_seq_len",
        "Without chunked prefill a prompt must fit into one step: raise --max-num-tokens.",
    ),
    "TC-120": (
        "The target does not run this format on this GPU",
        "The hint names the nearest combination that works; `toolchain support` lists all of them.",
    ),
    "TC-121": (
        "The format runs with limits",
        "It works, but not as the format's name promises: read the finding.",
    ),
    "TC-122": ("No such KV cache on this GPU", "Use --kv-cache none."),
    "TC-123": ("The target needs a GPU", "Choose --gpu, or --target local."),
    "TC-124": (
        "The target is deprecated or cannot be built",
        "Use --target trtllm, which loads the same checkpoint.",
    ),
    "TC-125": (
        "The target does not run a quantized lm_head, or is not known to",
        "Leave --lm-head out: it is a small part of a mixture of experts.",
    ),
    "TC-126": (
        "The target does not load several formats in one mixture of experts of this family",
        "Give all quantized parts one format: --attention and --shared-experts take bf16 and same.",
    ),
    "TC-127": (
        "trtllm-build cannot get a checkpoint of this model",
        "Target tensorrt is for few model classes and one format per checkpoint. Use --target trtllm, which loads the "
        "unified checkpoint as it is.",
    ),
    "TC-128": (
        "A combination that is known to fail, or to have failed, in this release",
        "The finding names the report and what to use instead; `toolchain support` lists all that are recorded.",
    ),
    "TC-129": (
        "No MoE backend does what is asked for",
        "The finding lists the backends of this release that do; leave --moe-backend out to have one chosen.",
    ),
    "TC-130": (
        "It does not fit the GPU's memory",
        "Fewer or shorter requests, an FP8 KV cache, a smaller format, more GPUs, or a larger one.",
    ),
    "TC-131": ("max_seq_len is more than the model has positions for", "Lower --max-seq-len."),
    "TC-160": (
        "Calibration options contradict each other, or ask for what cannot be reached",
        "The finding names the option and what would work.",
    ),
    "TC-161": (
        "A calibration option has no effect on this model",
        "A dense model has no experts to cover: leave the option out.",
    ),
    "TC-140": (
        "The family's storage of experts has no place for this format or recipe, or the target no loader for it",
        "gpt-oss and Llama 4 store all experts of a layer in one tensor: the finding names the formats that fit.",
    ),
    "TC-141": (
        "The source is quantized in a layout that is not read",
        "Read are FP8 with weight_block_size (DeepSeek-V3) and MXFP4 (gpt-oss). Else start from the BF16 release.",
    ),
    "TC-142": (
        "The policy quantizes nothing",
        "A dense model has no routed experts: use --policy all-linear.",
    ),
    "TC-143": (
        "The family is not declared",
        "Names were recognised by the generic rule: check the assignments.",
    ),
    "TC-144": (
        "There are no weights",
        "A plan needs config.json only; quantization needs the safetensors files.",
    ),
    "TC-145": (
        "A quantized source is dequantized first",
        "FP8 to fp8_block and MXFP4 to mxfp4, nvfp4 or w4a16_nvfp4 keep the numbers; anything else rounds them again.",
    ),
    "TC-150": (
        "A recipe or an optimiser quantizes what must be kept",
        "Routers, gates, norms and embeddings keep their dtype, whoever asks. Take the pattern out of the recipe.",
    ),
    "TC-151": (
        "A decision about a part that the model does not have",
        "`toolchain plan` lists the parts of each layer.",
    ),
    "TC-152": (
        "Parts that runtimes run as one matmul have several formats",
        "q/k/v, gate/up and MLA's down projections need one format each.",
    ),
    "TC-153": (
        "The experts of one layer have several formats",
        "Fused MoE kernels take one format per layer, for all experts and all of their projections.",
    ),
    "TC-154": (
        "Experts are left in the source dtype, and nothing said so",
        "Most parameters of a mixture of experts are in its experts. Protect layers by name, or quantize them.",
    ),
    "TC-156": (
        "lm_head cannot be quantized: it shares the embedding's weight",
        "Leave --lm-head out.",
    ),
    "TC-157": ("An option of the policy has no effect on this model", "Leave it out."),
    "TC-159": (
        "A recipe file cannot be applied as it is",
        "ModelOpt recipes of type ptq are read; every quantizer setting in them must be one of the formats here.",
    ),
    "TC-158": (
        "A value of a policy option does not exist",
        "--attention and --shared-experts take default, bf16, fp8 or same; --lm-head bf16, fp8 or same; "
        "--protect-first and --protect-last count layers from 0.",
    ),
    "TC-170": (
        "Mixed precision was asked for in a way that cannot be searched",
        "--format auto takes --bits, and candidates in --auto-formats that the target runs and loads together.",
    ),
    "TC-171": (
        "The budget of bits cannot be reached",
        "Bits count the whole checkpoint, unquantized parts and scales included: the finding names the least and the "
        "most that the candidates make of this model.",
    ),
    "TC-172": (
        "Mixed precision was not better than one format",
        "On held-out text its KL was not lower beyond noise: the uniform format was kept. auto.json has the figures.",
    ),
    "TC-173": (
        "The formats of an auto plan are chosen by measurement",
        "A plan reads no weights: it shows the smallest choice. `toolchain quantize` and `toolchain engine` measure.",
    ),
    "TC-174": (
        "auto.json does not belong to this request",
        "It was written for another model, budget or set of candidates: delete it, or pass --force.",
    ),
    "TC-180": (
        "Cells of a sweep cannot be planned",
        "Nothing was run. Each is named with its reason: exclude it in the SPEC, correct it, or pass --skip-refused.",
    ),
    "TC-181": (
        "Cells of a sweep have one name",
        "Each needs a directory of its own. Give models of equal directory names a label (models: {first: DIR, second: "
        "DIR}), and take doubles out of include.",
    ),
    "TC-182": ("There is no such cell, or no sweep", "`toolchain sweep SPEC --dry-run` lists the cells."),
    "TC-183": (
        "The process of a cell was ended from outside, or crashed",
        "What it had finished is kept, cells/<name>.log beside the table has what it said. The same command goes on; "
        "where memory was short, --stream needs less (stream: true in the SPEC's base).",
    ),
    "TC-184": (
        "The exclude of a sweep leaves out nothing, or everything",
        "Each entry must match a cell of the grid: one that matches none has a misspelt value.",
    ),
    "TC-190": (
        "Training does not fit into memory",
        "The finding says what takes how much and what would fit. Training holds the weights, their gradients and two "
        "moments of the optimizer in float32, the teacher and the activations: --gradient-checkpointing, a smaller "
        "--batch-size with more --accumulate, --lora, or --parallel fsdp2 over more devices.",
    ),
    "TC-191": (
        "This plan cannot be trained",
        "Trained weights are packed as any others are: recipes that choose codes, block scales or other weights after "
        "calibration would undo the training. Use --recipe default, and a source whose weights are not packed already.",
    ),
    "TC-192": (
        "There is too little training data",
        "Training needs one optimizer step of sequences at least (devices x batch size x accumulate x length tokens), "
        "and held-out text: a share of the documents, or --held-out.",
    ),
    "TC-193": (
        "The training data, the tokenizer and the model do not belong together",
        "Ids must be those of the tokenizer beside config.json, and each needs a row in the embedding.",
    ),
    "TC-194": (
        "Held-out text also stands in the training text",
        "What was trained on says nothing about the rest, and early stopping would come too late. Take it out of one "
        "of the two.",
    ),
    "TC-195": (
        "The calibration could not be repeated",
        "Training starts from the scales of the engine's checkpoint, bit for bit: another device, thread count or "
        "library version may round otherwise. Train from the MODEL instead, which calibrates anew.",
    ),
    "TC-196": (
        "An option of training is out of range, or contradicts another",
        "The finding names it and what would work.",
    ),
    "TC-197": (
        "Training cannot start from this engine",
        "An engine names its model and calibration text; both must still be there, unchanged. Give the MODEL instead.",
    ),
}
