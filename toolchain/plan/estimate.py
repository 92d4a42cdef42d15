"""The figures of a plan: counts and sizes are exact, memory follows formulas, time is a rough guess."""

from __future__ import annotations

from collections import defaultdict

from toolchain.core.gpus import Gpu
from toolchain.core.roles import Role
from toolchain.formats.base import DTYPE_BYTES
from toolchain.models.types import ModelInfo
from toolchain.plan.choices import Choices, held
from toolchain.plan.memory import (
    EMULATED,
    activation_bytes,
    activations_basis,
    held_kv_cache,
    kv_cache_bytes,
    mlp_width,
    weights_bytes,
)
from toolchain.plan.streaming import BASIS, stream_memory
from toolchain.plan.types import SOURCE_DTYPE, Assignment, Calibration, Estimates, Serving
from toolchain.recipes import GRAM_BUDGET_BYTES, SAMPLE_TOKENS, Recipe
from toolchain.targets.base import Target

GIB = 1024**3

# Measured on two CPU threads with a 90M-parameter Qwen3-MoE (8 layers, 16 experts, FP32) and 32 x 512 tokens:
# plain forward of 4 x 512 tokens 0.9 s, NVFP4 calibration 8.2 s, INT4-AWQ calibration 39.1 s, export 2.4 s.
CPU_FLOPS = 2e11
CPU_PACK_PARAMETERS_S = 3.5e7
PASSES = {"plain": 1, "searched": 5, "compared": 14}
"""Forward passes that calibration costs, sums of products included: ranges alone; a walk through the layers that
collects second moments; one that compares each of four stages of a layer with the layer before."""
# Assumed, not measured: a quarter of the dense BF16 peak of an A100, and storage that gives 1 GB/s.
GPU_FLOPS = 8e13
GPU_PACK_PARAMETERS_S = 2e9
STORAGE_BYTES_S = 1e9


def active_parameters(info: ModelInfo) -> int:
    """Parameters that one token uses: top-k of the routed experts; nothing with the role OTHER."""
    routed = rest = 0
    for tensor in info.tensors:
        role = info.part(tensor.name).role
        if role is Role.ROUTED_EXPERT:
            routed += tensor.parameters
        elif role is not Role.OTHER:
            rest += tensor.parameters
    return rest + (routed * info.num_experts_per_tok // info.num_experts if info.is_moe else 0)


def estimate(
    info: ModelInfo,
    assignments: tuple[Assignment, ...],
    *,
    choices: Choices,
    recipe: Recipe,
    kv_cache: str,
    gpu: Gpu,
    target: Target,
    serving: Serving,
    calibration: Calibration,
) -> Estimates:
    """Every figure of the plan."""
    checkpoint = sum(item.planned_bytes for item in assignments)
    quantized = sum(linear.parameters for linear, _ in choices.quantized(info))
    seconds, time_basis = quantize_seconds(info, choices, recipe, quantized, checkpoint, gpu, calibration)
    memory, memory_basis = quantize_memory(info, recipe, checkpoint, calibration)
    formats = {item.format for item in assignments} - {SOURCE_DTYPE}
    grams = _observed_bytes(info, recipe)
    streamed, scratch, way = stream_memory(info, formats, recipe, kv_cache, calibration, grams)
    return Estimates(
        parameters=info.parameters,
        active_parameters=active_parameters(info),
        quantized_parameters=quantized,
        source_bytes=info.source_bytes,
        checkpoint_bytes=checkpoint,
        effective_bits=checkpoint * 8 / info.parameters,
        weights_per_gpu_bytes=weights_bytes(info, held(choices, target, gpu.sm), serving),
        kv_cache_per_gpu_bytes=kv_cache_bytes(
            info, held_kv_cache(target, kv_cache, gpu.sm), serving, per_head=target.emulates
        ),
        activations_per_gpu_bytes=activation_bytes(info, serving),
        gpu_memory_bytes=round(gpu.memory_gib * GIB),
        quantize_memory_bytes=memory,
        quantize_seconds=seconds,
        stream_way=way,
        stream_memory_bytes=streamed,
        stream_disk_bytes=scratch,
        basis="; ".join(
            part
            for part in (
                "" if all(target.keeps(name, gpu.sm) for name in formats) else EMULATED,
                activations_basis(serving),
                memory_basis,
                BASIS[way],
                time_basis,
            )
            if part
        ),
    )


def quantize_memory(
    info: ModelInfo, recipe: Recipe, checkpoint: int, calibration: Calibration
) -> tuple[int, str]:
    """(bytes, basis): the model, its largest layer again while experts are unfused, one batch, and what a recipe keeps:
    the inputs of one layer for all tokens, their Gram matrices, and the tensors that it chose."""
    layers: dict[int | None, int] = defaultdict(int)
    for tensor in info.tensors:
        layers[info.part(tensor.name).layer] += tensor.bytes
    largest = max((size for layer, size in layers.items() if layer is not None), default=0)
    element = DTYPE_BYTES[info.dtype]
    tokens = calibration.batch_size * calibration.length_tokens
    width = 8 * info.hidden_size + 4 * mlp_width(info, Serving(max_batch_size=1, max_seq_len=1))
    total = info.bytes + largest + tokens * (width * element + info.vocab_size * DTYPE_BYTES["F32"])
    basis = (
        "quantize memory = source weights + the largest layer again (experts are unfused layer by layer) + "
        f"activations and FP32 logits of one batch of {calibration.batch_size} x "
        f"{calibration.length_tokens} tokens"
    )
    if recipe.walks:
        hidden = 2 * calibration.samples * calibration.length_tokens * info.hidden_size * element
        total += hidden + min(GRAM_BUDGET_BYTES, _observed_bytes(info, recipe)) + checkpoint
        basis += (
            f" + for recipe {recipe.name} the hidden states of all tokens twice, the inputs kept of one layer "
            f"(at most {GRAM_BUDGET_BYTES / GIB:.0f} GiB) and the chosen tensors"
        )
    return total, basis


def _observed_bytes(info: ModelInfo, recipe: Recipe) -> int:
    """What a recipe keeps of the inputs of the layer with most of them: samples first, second moments after."""
    samples: dict[int | None, int] = defaultdict(int)
    if recipe.on("order"):
        for linear in info.linears:
            if linear.part.projection in (info.family.gate_up_down[2], "down_proj"):
                held = 4 * SAMPLE_TOKENS * DTYPE_BYTES[info.dtype]
                samples[linear.part.layer] += held * linear.in_features
    grams = _gram_bytes(info, recipe) if recipe.needs_gram else 0
    return max(grams, *samples.values(), 0)


def _gram_bytes(info: ModelInfo, recipe: Recipe) -> int:
    """Of the layer with most of them: [K, K] float32 per matrix but the second of gate and up, and of q, k and v."""
    matrices = 4 if recipe.on("target") else 1
    layers: dict[int | None, int] = defaultdict(int)
    for linear in info.linears:
        siblings = info.family.fused_siblings(linear.part.projection)
        if linear.part.layer is not None and siblings[0] == linear.part.projection:
            layers[linear.part.layer] += matrices * DTYPE_BYTES["F32"] * linear.in_features**2
    return max(layers.values(), default=0)


def quantize_seconds(
    info: ModelInfo,
    choices: Choices,
    recipe: Recipe,
    quantized: int,
    checkpoint: int,
    gpu: Gpu,
    calibration: Calibration,
) -> tuple[float, str]:
    """(seconds, basis) of calibration, the recipe, packing and reading and writing.

    Good to a factor of a few, not more.
    """
    tokens = calibration.samples * calibration.length_tokens
    compared = recipe.on("target") is not None
    passes = PASSES["compared" if compared else "searched" if recipe.walks else "plain"]
    on_cpu = gpu.sm == 0
    flops = CPU_FLOPS if on_cpu else GPU_FLOPS
    pack = CPU_PACK_PARAMETERS_S if on_cpu else GPU_PACK_PARAMETERS_S
    compute = 2 * active_parameters(info) * tokens * passes / flops
    if recipe.on("rounding"):
        # GPTQ: every weight corrects all channels after it.
        compute += (
            sum(linear.parameters * linear.in_features for linear, _ in choices.quantized(info)) / flops
        )
    seconds = compute + quantized / pack + (info.bytes + checkpoint) / STORAGE_BYTES_S
    kind = "two CPU threads (measured)" if on_cpu else "one GPU (assumed)"
    basis = (
        f"quantize time = 2 x active parameters x {tokens} tokens x {passes} passes at "
        f"{flops:.0e} FLOP/s on {kind}, "
        f"packing {pack:.1e} parameters/s, storage {STORAGE_BYTES_S:.0e} bytes/s"
    )
    return round(seconds, 1), basis
