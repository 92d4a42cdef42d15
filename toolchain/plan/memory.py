"""Memory of one GPU at serving: weights of the fullest rank, KV cache, activations. Bytes everywhere."""

from __future__ import annotations

from collections import defaultdict

from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.formats.base import DTYPE_BYTES
from toolchain.formats.kv import get_kv_cache
from toolchain.models.types import LinearInfo, ModelInfo, TensorInfo
from toolchain.plan.assign import stored_bytes
from toolchain.plan.choices import Choices
from toolchain.plan.types import Serving
from toolchain.targets.base import Target

_REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")
"""MLA's down projections: every tensor-parallel rank holds all of them."""

# Attention data parallelism, from TensorRT-LLM's tensorrt_llm/_torch/models: modeling_deepseekv3.py gives attention,
# shared experts and dense MLPs a tp of 1, modeling_qwen3_moe.py the embedding, modeling_utils.py lm_head.


def moe_tp(serving: Serving) -> int:
    """Ranks that one expert's matrices are cut over: TensorRT-LLM keeps moe_tp * moe_ep = tp."""
    return max(1, serving.tp // serving.ep)


def split_layers(layers: int, pp: int) -> list[range]:
    """Contiguous layers of each pipeline rank; the first ranks take the remainder."""
    base, extra = divmod(layers, pp)
    starts = [rank * base + min(rank, extra) for rank in range(pp + 1)]
    return [range(starts[rank], starts[rank + 1]) for rank in range(pp)]


def expert_share(info: ModelInfo, serving: Serving) -> float:
    """The part of all routed experts of a layer that the fullest rank holds, replicas of load balancing included."""
    held = -(-max(info.num_experts, serving.eplb_slots) // serving.ep)
    return held / info.num_experts / moe_tp(serving)


def linear_share(info: ModelInfo, linear: LinearInfo, serving: Serving) -> float:
    """The part of one matrix that the fullest tensor/expert-parallel rank holds, averaged over experts."""
    role, tp = linear.part.role, serving.attention_tp
    if role is Role.ROUTED_EXPERT:
        return expert_share(info, serving)
    if role is Role.ROUTER or linear.part.projection in _REPLICATED:
        return 1.0
    if linear.part.projection in ("k_proj", "v_proj"):
        return 1 / min(tp, info.attention.num_kv_heads)
    return 1 / tp


def weights_bytes(info: ModelInfo, choices: Choices, serving: Serving) -> int:
    """Weights of the fullest rank.

    Norms, routers, biases and parts outside of the decoder are on every rank.
    """
    layers: dict[int, float] = defaultdict(float)
    matrices: set[str] = set()
    for linear in info.linears:
        part = linear.part
        matrices.add(linear.name)
        if part.layer is None or part.role not in QUANTIZABLE:
            continue
        chosen = choices.format_of(linear)
        plain = linear.parameters * DTYPE_BYTES[linear.dtype]
        size = stored_bytes(info.family, linear, chosen, choices) if chosen else plain
        layers[part.layer] += size * linear_share(info, linear, serving)
    everywhere = first = last = 0.0
    head = next((item for item in info.by_role(Role.LM_HEAD) if choices.format_of(item)), None)
    for tensor in info.tensors:
        part = info.part(tensor.name)
        if tensor.name.removesuffix(".weight") in matrices and part.role in QUANTIZABLE:
            continue
        if part.role is Role.ROUTED_EXPERT and len(tensor.shape) == 3:
            continue
        if part.role is Role.EMBEDDING:
            first += tensor.bytes / serving.attention_tp
            last += tensor.bytes / serving.attention_tp if info.tied_embeddings and serving.pp > 1 else 0
        elif part.role is Role.LM_HEAD:
            found = choices.format_of(head) if head else None
            size = stored_bytes(info.family, head, found, choices) if head and found else tensor.bytes
            last += size / serving.attention_tp
        elif is_mtp(info, tensor):
            last += mtp_bytes(info, tensor, serving)
        elif part.layer is not None and part.role is not Role.OTHER:
            layers[part.layer] += tensor.bytes
        else:
            everywhere += tensor.bytes
    ranks = split_layers(info.num_hidden_layers, serving.pp)
    sizes = [sum(layers[layer] for layer in rank) + everywhere for rank in ranks]
    sizes[0] += first
    sizes[-1] += last
    return round(max(sizes))


def is_mtp(info: ModelInfo, tensor: TensorInfo) -> bool:
    """True for tensors of multi-token prediction: their layers follow those of the decoder."""
    layer = info.part(tensor.name).layer
    return layer is not None and layer >= info.num_hidden_layers and not info.family.is_tower(tensor.name)


def mtp_bytes(info: ModelInfo, tensor: TensorInfo, serving: Serving) -> float:
    """What a rank holds of a tensor of multi-token prediction: nothing unless it drafts; experts are divided."""
    if not serving.mtp_layers:
        return 0
    routed = info.family.classify(tensor.name).role is Role.ROUTED_EXPERT
    return tensor.bytes * (expert_share(info, serving) if routed else 1)


def held_kv_cache(target: Target, kv_cache: str, sm: int) -> str:
    """What the KV cache is held as in memory: an emulating target rounds the values and keeps the dtype."""
    return kv_cache if target.keeps_kv(kv_cache, sm) else "none"


def kv_bytes_per_token(info: ModelInfo, kv_cache: str, serving: Serving, *, per_head: bool = False) -> float:
    """KV cache of one token on the fullest rank, drafting layers included.

    Not divided: MLA's latent, of which every rank needs all, and with attention data parallelism any cache.
    ``per_head``: MLA's keys and values are kept for each head, as transformers does, instead of their latent.
    """
    held = get_kv_cache(kv_cache)
    element = held.bits / 8 if held.quant_algo else DTYPE_BYTES[info.dtype]
    attention = info.attention
    is_mla = bool(info.config.get("kv_lora_rank"))
    heads_share = 1 if is_mla else min(serving.attention_tp, attention.num_kv_heads)
    layers = -(-attention.num_layers // serving.pp) + serving.mtp_layers
    elements = attention.kv_elements_per_token_per_layer
    if is_mla and per_head:
        elements = attention.num_heads * (attention.head_dim + int(info.config["v_head_dim"]))
    return elements * layers * element / heads_share


def kv_cache_bytes(info: ModelInfo, kv_cache: str, serving: Serving, *, per_head: bool = False) -> int:
    """KV cache of ``max_batch_size`` requests of ``max_seq_len`` tokens, all of which one rank may hold.

    Sliding windows are counted in full.
    """
    each = kv_bytes_per_token(info, kv_cache, serving, per_head=per_head)
    return round(serving.max_batch_size * serving.max_seq_len * each)


def mlp_width(info: ModelInfo, serving: Serving) -> int:
    """Intermediate elements per token of the widest layer of a rank: top-k plus shared, or dense."""
    widths: dict[Role, int] = defaultdict(int)
    gate = (info.family.gate_up_down[0], "gate_proj")
    for linear in info.linears:
        if linear.part.projection in gate:
            widths[linear.part.role] = max(widths[linear.part.role], linear.out_features)
    moe = widths[Role.ROUTED_EXPERT] * info.num_experts_per_tok // moe_tp(serving)
    tp = serving.attention_tp
    return max(moe + widths[Role.SHARED_EXPERT] // tp, widths[Role.DENSE_MLP] // tp)


def activation_bytes(info: ModelInfo, serving: Serving) -> int:
    """Workspace of one forward step; the formula is in ``activations_basis``."""
    tokens = max(
        serving.max_batch_size, min(serving.max_num_tokens, serving.max_batch_size * serving.max_seq_len)
    )
    attention = info.attention
    heads = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim // serving.attention_tp
    # Before the experts, every rank gathers the tokens of all others.
    gathered = serving.tp * info.hidden_size if serving.attention_dp and info.is_moe else 0
    per_token = 4 * info.hidden_size + heads + 3 * mlp_width(info, serving) + gathered
    logits = serving.max_batch_size * info.vocab_size * DTYPE_BYTES["F32"]
    return tokens * per_token * DTYPE_BYTES[info.dtype] + logits


def activations_basis(serving: Serving) -> str:
    """The formula of ``activation_bytes`` in words."""
    gathered = " + the hidden states of all ranks" if serving.attention_dp else ""
    return (
        f"activations = tokens x (4 hidden + q, k and v + 3 MLP widths of the top-k experts{gathered}) x element bytes "
        f"+ FP32 logits of the batch, with tokens = min(max_num_tokens {serving.max_num_tokens}, max_batch_size x "
        "max_seq_len)"
    )


EMULATED = (
    "the local target decodes these weights to the source dtype: in memory they are as large as the source's"
)
