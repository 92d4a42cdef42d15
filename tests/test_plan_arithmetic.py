"""Planning arithmetic over many shapes: bytes add up, and divisibility is reported exactly when it fails."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.core.roles import Role
from toolchain.families import FAMILIES
from toolchain.formats import FORMATS
from toolchain.models import Attention, ModelInfo, TensorInfo
from toolchain.models.inventory import linears_of
from toolchain.plan import POLICIES, Serving, make_plan

QWEN3_MOE = next(family for family in FAMILIES if family.name == "qwen3_moe")
FORMAT_NAMES = st.sampled_from([item.name for item in FORMATS])
POLICY_NAMES = st.sampled_from([item.name for item in POLICIES])


def model(
    *, layers: int, experts: int, hidden: int, width: int, heads: int, kv_heads: int, head_dim: int
) -> ModelInfo:
    """A Qwen3-MoE of these dimensions, without a file."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (512, hidden),
        "lm_head.weight": (512, hidden),
    }
    for layer in range(layers):
        root = f"model.layers.{layer}"
        shapes[f"{root}.input_layernorm.weight"] = (hidden,)
        shapes[f"{root}.mlp.gate.weight"] = (experts, hidden)
        for name, out in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{root}.self_attn.{name}_proj.weight"] = (out * head_dim, hidden)
        shapes[f"{root}.self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        for expert in range(experts):
            for name in ("gate", "up"):
                shapes[f"{root}.mlp.experts.{expert}.{name}_proj.weight"] = (width, hidden)
            shapes[f"{root}.mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
    tensors = tuple(TensorInfo(name=name, shape=shape, dtype="BF16") for name, shape in shapes.items())
    config: dict[str, Any] = {"num_hidden_layers": layers, "architectures": ["Qwen3MoeForCausalLM"]}
    attention = Attention(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        kv_elements_per_token_per_layer=2 * kv_heads * head_dim,
    )
    return ModelInfo(
        source="made-up/model", path=None, architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe",
        family=QWEN3_MOE, config=config, tensors=tensors, linears=linears_of(QWEN3_MOE, tensors, layers),
        attention=attention, num_experts=experts, num_experts_per_tok=min(2, experts), dtype="BF16", has_weights=True,
        has_tokenizer=True, chat_template=False, tied_embeddings=False, hidden_size=hidden, vocab_size=512,
        max_position_embeddings=4096,
    )  # fmt: skip


MODELS = st.builds(
    model,
    layers=st.integers(1, 3),
    experts=st.sampled_from([2, 3, 4, 8]),
    hidden=st.sampled_from([96, 128, 256, 384]),
    width=st.sampled_from([72, 96, 128, 192, 256, 768]),
    heads=st.sampled_from([2, 4, 6, 8]),
    kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([32, 64]),
)
SERVINGS = st.builds(
    Serving,
    max_batch_size=st.integers(1, 64),
    max_seq_len=st.integers(1, 4096),
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    ep=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 3]),
)


IN_BLOCKS = {
    "nvfp4": 16, "w4a16_nvfp4": 16, "w4a8_nvfp4_fp8": 32, "mxfp4": 32, "mxfp8": 32, "int4_awq": 128, "int4_gptq": 128,
    "w4a8_awq": 128,
}  # fmt: skip
"""Elements of in_features that share a scale and must be whole. A block of fp8_block may be cut off at the border."""
RANK_BLOCKS = {**IN_BLOCKS, "fp8_block": 128}
"""The same for the piece of one rank."""
PER_CHANNEL = ("int4_awq", "int4_gptq", "w4a8_awq", "int8_sq")
"""Formats that store a factor per input channel where no norm takes it."""


def bits(format: str, out: int, wide: int) -> int:
    """Bytes of one matrix, written out by hand from the layouts in ModelOpt's export."""
    half, blocks = out * wide // 2, out * wide // IN_BLOCKS.get(format, 1)
    return {
        "fp8": out * wide + 4 + 4,
        "fp8_block": out * wide + 4 * -(-out // 128) * -(-wide // 128),
        "fp8_per_channel_per_token": out * wide + 4 * out,
        "nvfp4": half + blocks + 4 + 4,
        "w4a16_nvfp4": half + blocks + 4,
        "w4a8_nvfp4_fp8": half + blocks + 4 + 4,
        "mxfp4": half + blocks,
        "mxfp8": out * wide + blocks,
        "int4_awq": half + 4 * blocks,
        "int4_gptq": half + 4 * blocks,
        "w4a8_awq": half + 4 * blocks + 4 + 4,
        "int8_sq": out * wide + 4 * out + 4,
        "int8_wo": out * wide + 4 * out,
    }[format]


@given(MODELS, FORMAT_NAMES, POLICY_NAMES)
@settings(max_examples=60, deadline=None)
def test_checkpoint_bytes_are_the_sum_of_what_formats_store(
    info: ModelInfo, format: str, policy: str
) -> None:
    roles = {"experts-only": (Role.ROUTED_EXPERT,), "mlp-only": (Role.ROUTED_EXPERT,)}.get(
        policy, (Role.ROUTED_EXPERT, Role.ATTENTION)
    )
    expected = 0
    for tensor in info.tensors:
        role = info.part(tensor.name).role
        if role not in roles or len(tensor.shape) != 2:
            expected += tensor.bytes
        elif tensor.shape[1] % IN_BLOCKS.get(format, 1):
            return  # does not fit: TC-110, and the size means nothing
        else:
            expected += bits(format, *tensor.shape)
            folded = tensor.name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
            expected += 2 * tensor.shape[1] if format in PER_CHANNEL and not folded else 0
    assert make_plan(info, format=format, policy=policy).estimates.checkpoint_bytes == expected


@given(MODELS, FORMAT_NAMES, POLICY_NAMES, SERVINGS)
@settings(max_examples=150, deadline=None)
def test_findings_appear_exactly_when_something_does_not_divide(
    info: ModelInfo, format: str, policy: str, serving: Serving
) -> None:
    plan = make_plan(info, format=format, policy=policy, gpu="b200", target="trtllm", serving=serving)
    found = [item.code for item in plan.findings]
    group, piece = IN_BLOCKS.get(format, 1), RANK_BLOCKS.get(format, 1)
    width, heads = linear_width(info), info.attention.num_heads * info.attention.head_dim
    tp, ep, kv_heads = serving.tp, serving.ep, info.attention.num_kv_heads
    moe_tp = max(1, tp // ep)
    attention_group = piece if policy == "all-linear" else 1

    # down_proj [H, width] and gate/up [width, H]; with attention also o_proj [H, heads] and q/k/v [., H].
    kinds = [width % group] + [info.hidden_size % group] * 2
    if policy == "all-linear":
        kinds += [heads % group] + [info.hidden_size % group] * (
            2 if info.attention.num_heads != kv_heads else 1
        )
    assert ("TC-110" in found) == any(kinds)

    broken_width = moe_tp > 1 and bool(width % moe_tp or width // moe_tp % piece)
    broken_heads = tp > 1 and bool(heads % tp or heads // tp % attention_group)
    assert found.count("TC-111") == broken_width + broken_heads
    bad_heads = bool(info.attention.num_heads % tp) + bool(kv_heads % tp and tp % kv_heads)
    assert found.count("TC-112") == bad_heads
    assert found.count("TC-113") == (ep > 1) * (bool(info.num_experts % ep) + bool(tp % ep))
    layers = info.num_hidden_layers
    assert ("TC-114" in found) == (serving.pp > layers or layers % serving.pp != 0)


def linear_width(info: ModelInfo) -> int:
    return next(linear.in_features for linear in info.linears if linear.part.projection == "down_proj")


@given(MODELS, FORMAT_NAMES, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_ranks_together_hold_the_checkpoint(info: ModelInfo, format: str, tp: int, pp: int) -> None:
    """The fullest rank has at least its share, and never more than everything."""
    serving = Serving(max_batch_size=1, max_seq_len=16, tp=tp, pp=pp)
    estimates = make_plan(info, format=format, gpu="b200", target="trtllm", serving=serving).estimates
    assert estimates.weights_per_gpu_bytes <= estimates.checkpoint_bytes
    assert estimates.weights_per_gpu_bytes * tp * pp >= estimates.checkpoint_bytes
    if tp == pp == 1:
        assert estimates.weights_per_gpu_bytes == estimates.checkpoint_bytes


@given(MODELS, SERVINGS)
@settings(max_examples=60, deadline=None)
def test_kv_cache_grows_with_requests_and_shrinks_with_ranks(info: ModelInfo, serving: Serving) -> None:
    def kv(**changes: int) -> int:
        values = {
            name: getattr(serving, name) for name in ("max_batch_size", "max_seq_len", "tp", "ep", "pp")
        }
        return make_plan(
            info, format="fp8", serving=Serving(**values | changes)
        ).estimates.kv_cache_per_gpu_bytes

    assert kv(max_batch_size=serving.max_batch_size * 2) == 2 * kv()
    assert kv(max_seq_len=serving.max_seq_len * 3) == 3 * kv()
    assert kv(tp=1, pp=1) >= kv()
