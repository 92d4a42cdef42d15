"""Memory of training, on the fullest device. Bytes everywhere."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import ceil

from toolchain.core.roles import ASSIGNABLE, Role
from toolchain.formats.base import DTYPE_BYTES
from toolchain.models.types import LinearInfo, ModelInfo
from toolchain.plan.memory import mlp_width
from toolchain.plan.steps import Training
from toolchain.plan.types import Serving

F32 = DTYPE_BYTES["F32"]
MOMENTS = 2
"""AdamW keeps two per trained parameter."""
LOSS_ROWS, LOSS_COPIES = 1024, 5
"""Positions whose float32 distributions the loss holds at once, and how many (``toolchain.qat.losses``)."""
USABLE = 0.9
"""Share of a GPU's memory that tensors may take: context, kernels and fragments need the rest."""
MOST_DEVICES = 64
MOST_LORA_RANK = 16
BASIS = (
    "training memory = float32 weights, gradients and two moments of what is trained, teacher, rounded weights that "
    "the backward pass needs, activations and logits of one batch"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a model training depends on, counted once."""

    parameters: int
    """All of them: frozen weights are held in float32, too."""
    trained: int
    """Parameters of the trained roles."""
    adapted: tuple[tuple[int, int], ...]
    """(out, in) of the matrices that adapters would go on."""
    quantized: int
    largest_layer: int
    """Parameters of the largest decoder layer."""
    quantized_in_layer: int
    """Quantized parameters of the layer with most of them."""
    ends: int
    """Parameters of embeddings and output head."""
    teacher_bytes: int
    layers: int
    hidden: int
    attention: int
    """Elements per token of queries, keys and values of one layer."""
    mlp: int
    """Elements per token between gate, up and down of one layer: top-k experts and shared ones."""
    experts: int
    """Experts that a token visits; 1 for a dense model."""
    vocabulary: int
    element: int
    """Bytes of an element of the teacher's activations under bf16."""


def adaptable_linears(info: ModelInfo) -> list[LinearInfo]:
    """Matrices that adapters may go on, quantized or not."""
    return [item for item in info.linears if item.part.role in ASSIGNABLE]


def sizes_of(
    info: ModelInfo, quantized: list[LinearInfo], roles: tuple[str, ...], teacher_bytes: int | None
) -> Sizes:
    """``teacher_bytes`` None: the model itself, in its own dtype."""
    layers: dict[int, int] = defaultdict(int)
    trained = ends = 0
    for tensor in info.tensors:
        part = info.part(tensor.name)
        trained += tensor.parameters if part.role.value in roles else 0
        ends += tensor.parameters if part.role in (Role.EMBEDDING, Role.LM_HEAD) else 0
        if part.layer is not None:
            layers[part.layer] += tensor.parameters
    rounded: dict[int, int] = defaultdict(int)
    for linear in quantized:
        rounded[linear.part.layer or 0] += linear.parameters
    heads = info.attention
    return Sizes(
        parameters=info.parameters,
        trained=trained,
        adapted=tuple(
            (item.out_features, item.in_features)
            for item in adaptable_linears(info)
            if item.part.role.value in roles
        ),
        quantized=sum(rounded.values()),
        largest_layer=max(layers.values(), default=0),
        quantized_in_layer=max(rounded.values(), default=0),
        ends=ends,
        teacher_bytes=info.bytes if teacher_bytes is None else teacher_bytes,
        layers=info.num_hidden_layers,
        hidden=info.hidden_size,
        attention=(heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim,
        mlp=mlp_width(info, Serving(max_batch_size=1, max_seq_len=1)),
        experts=max(1, info.num_experts_per_tok if info.is_moe else 1),
        vocabulary=info.vocab_size,
        element=DTYPE_BYTES[info.dtype],
    )


def has_teacher(training: Training) -> bool:
    """Distillation learns from it; early stopping measures the distance from it."""
    return training.method == "qad" or training.patience > 0


def training_memory(sizes: Sizes, training: Training, *, on_host: bool = False) -> dict[str, int]:
    """What takes how much on the fullest device, by name. ``on_host``: where checkpoints are serialized, too."""
    lora = sum(training.lora_rank * (rows + columns) for rows, columns in sizes.adapted)
    trained = lora if training.lora_rank else sizes.trained
    cut = training.devices if training.parallel == "fsdp2" else 1
    gathered = 2 * F32 * sizes.largest_layer if cut > 1 else 0  # one layer's weights and gradients, whole
    # DistributedDataParallel keeps gradients once more, in buckets.
    buckets = F32 * trained if training.devices > 1 and cut == 1 else 0
    tokens = training.batch_size * training.length_tokens
    found = {
        "weights": ceil(F32 * (sizes.parameters + lora) / cut) + gathered,
        "gradients": ceil(F32 * trained / cut) + buckets,
        "optimizer": ceil(MOMENTS * F32 * trained / cut),
        "teacher": ceil(_teacher(sizes, training) / cut) if has_teacher(training) else 0,
        "rounded weights": _rounded(sizes, training),
        "activations": _activations(sizes, training, tokens),
        "logits": _logits(sizes, training, tokens),
        "writing a checkpoint": MOMENTS * F32 * trained if on_host else 0,
    }
    return {name: size for name, size in found.items() if size}


def training_disk(sizes: Sizes, training: Training, source_bytes: int) -> int:
    """The trained model, what calibration changed of it, and checkpoints (weights and moments of what is trained), of
    which one more than are kept exists while it is written."""
    lora = sum(training.lora_rank * (rows + columns) for rows, columns in sizes.adapted)
    trained = lora if training.lora_rank else sizes.trained
    return 2 * source_bytes + (training.keep_checkpoints + 2) * (1 + MOMENTS) * F32 * trained


def _teacher(sizes: Sizes, training: Training) -> float:
    """Bytes of its weights: in float32 where the student computes in float32."""
    return sizes.teacher_bytes * (F32 / sizes.element if training.precision == "fp32" else 1)


def _rounded(sizes: Sizes, training: Training) -> int:
    """Weights as matmuls take them, which the backward pass needs again: of one layer with checkpointing."""
    if training.precision == "fp32":
        kept = sizes.quantized_in_layer if training.gradient_checkpointing else sizes.quantized
        return F32 * kept + F32 * sizes.quantized_in_layer
    kept = (sizes.largest_layer + sizes.ends) if training.gradient_checkpointing else sizes.parameters
    return DTYPE_BYTES["BF16"] * kept + F32 * sizes.quantized_in_layer


def _activations(sizes: Sizes, training: Training, tokens: int) -> int:
    """What one layer keeps for its backward pass, in every layer or in one; the residual stream in all."""
    element = DTYPE_BYTES["BF16"] if training.precision == "bf16" else F32
    # Counts of tensors that autograd keeps, rounded inputs of every matrix included; measured (README).
    norms = 6 * F32 * sizes.hidden  # residual stream and norms stay in float32
    attention = element * (2 * sizes.hidden + 3 * sizes.attention)
    mlp = element * (4 * sizes.experts * sizes.hidden + 6 * sizes.mlp)
    layer = tokens * (norms + attention + mlp)
    if training.gradient_checkpointing:
        return layer + sizes.layers * tokens * F32 * sizes.hidden
    return sizes.layers * layer


def _logits(sizes: Sizes, training: Training, tokens: int) -> int:
    """Student's and their gradient, the teacher's, and the distributions of the loss."""
    element = DTYPE_BYTES["BF16"] if training.precision == "bf16" else F32
    judged = element if training.precision == "fp32" else sizes.element
    each = 2 * element + (judged if has_teacher(training) else 0)
    rows = min(tokens, LOSS_ROWS)
    return sizes.vocabulary * (tokens * each + rows * LOSS_COPIES * F32)


def fitting(sizes: Sizes, training: Training, room: int, *, on_host: bool) -> list[str]:
    """Options that bring a training below ``room`` bytes per device, alone or with the ones before, each with what it
    takes. ``on_host``: all devices share the room, so more of them do not help."""
    whole = training.batch_size * training.accumulate
    checkpointed = replace(training, gradient_checkpointing=True)
    single = replace(checkpointed, batch_size=1, accumulate=whole)
    ways: list[tuple[str, Training]] = []
    if not training.gradient_checkpointing:
        ways.append(("--gradient-checkpointing", checkpointed))
    if training.batch_size > 1:
        ways.append((f"--gradient-checkpointing --batch-size 1 --accumulate {whole}", single))
    if not training.lora_rank:
        rank = min([MOST_LORA_RANK, *(min(item) for item in sizes.adapted)])
        ways.append(("--lora", replace(training, lora_rank=rank)))
        ways.append(("--lora --gradient-checkpointing", replace(checkpointed, lora_rank=rank)))
    said = [
        f"{name} ({gib(total)})" for name, wanted in ways if (total := _total(sizes, wanted, on_host)) <= room
    ]
    shards = None if on_host else _fewest_devices(sizes, training, room)
    return [*said[:3], *([shards] if shards else [])]


def _fewest_devices(sizes: Sizes, training: Training, room: int) -> str | None:
    for kept in (training, replace(training, gradient_checkpointing=True)):
        count = 2
        while count <= MOST_DEVICES:
            total = _total(sizes, replace(kept, parallel="fsdp2", devices=count), False)
            if total <= room:
                extra = " --gradient-checkpointing" if kept is not training else ""
                return f"--parallel fsdp2 --devices {count}{extra} ({gib(total)} each)"
            count += 1
    return None


def _total(sizes: Sizes, training: Training, on_host: bool) -> int:
    takes = sum(training_memory(sizes, training, on_host=on_host).values())
    return takes * (training.devices if on_host else 1)


def gib(count: float) -> str:
    """GiB, or MiB of little."""
    return f"{count / 1024**3:.1f} GiB" if count >= 1024**3 else f"{count / 1024**2:.0f} MiB"
