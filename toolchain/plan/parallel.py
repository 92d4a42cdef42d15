"""Heads, experts and layers over tp, ep and pp."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from toolchain.core.findings import Finding
from toolchain.models.types import ModelInfo
from toolchain.plan.types import Serving
from toolchain.targets.base import Target

COUNTS = ("max_batch_size", "max_seq_len", "max_num_tokens", "tp", "ep", "pp")
"""Fields of ``Serving`` that count from 1."""


def serving_findings(serving: Serving) -> Iterator[Finding]:
    """Limits that make no sense for any model. The other checks are skipped when one of these is there."""
    for name in COUNTS:
        value = getattr(serving, name)
        if value < 1:
            option = f"--{name.replace('_', '-')}"
            yield Finding(code="TC-105", where=option, message=f"{option} is {value}, expected at least 1")


def parallel_findings(info: ModelInfo, target: Target, serving: Serving) -> Iterator[Finding]:
    """Everything that keeps this model from being cut this way."""
    if not target.parallel and max(serving.tp, serving.ep, serving.pp) > 1:
        message = (
            f"target {target.name} runs on one device, but tp={serving.tp} ep={serving.ep} pp={serving.pp}"
        )
        yield Finding(code="TC-115", where="--target", message=message, hint="leave tp, ep and pp at 1")
    yield from _heads(info, serving.attention_tp)
    yield from _experts(info, serving)
    yield from _layers(info, serving.pp)
    yield from _llm_api_only(target, serving)
    yield from _attention_dp(info, serving)
    yield from _balancing(info, serving)
    yield from _prefill(serving)
    if serving.max_seq_len > info.max_position_embeddings:
        message = (
            f"max_seq_len {serving.max_seq_len} exceeds the model's max_position_embeddings "
            f"{info.max_position_embeddings}"
        )
        hint = f"use --max-seq-len {info.max_position_embeddings} or less"
        yield Finding(code="TC-131", where="--max-seq-len", message=message, hint=hint)


def _heads(info: ModelInfo, tp: int) -> Iterator[Finding]:
    heads, kv_heads = info.attention.num_heads, info.attention.num_kv_heads
    if heads % tp:
        hint = f"use --tp {_largest(tp, lambda n: heads % n == 0)}"
        yield Finding(
            code="TC-112",
            where=f"--tp {tp}",
            message=f"num_attention_heads {heads} over tp={tp} does not divide",
            hint=hint,
        )
    # Fewer KV heads than ranks is fine: each head is then held by tp / kv_heads ranks.
    if kv_heads % tp and tp % kv_heads:
        hint = f"use --tp {_largest(tp, lambda n: kv_heads % n == 0 or n % kv_heads == 0)}"
        message = f"num_key_value_heads {kv_heads} and tp={tp}: neither divides the other"
        yield Finding(code="TC-112", where=f"--tp {tp}", message=message, hint=hint)


def _experts(info: ModelInfo, serving: Serving) -> Iterator[Finding]:
    ep, where = serving.ep, f"--ep {serving.ep}"
    if ep == 1:
        return
    if not info.is_moe:
        message = "the model is dense: there are no experts to divide"
        yield Finding(code="TC-113", where=where, message=message, hint="use --ep 1")
        return
    if info.num_experts % ep:
        hint = f"use --ep {_largest(ep, lambda n: info.num_experts % n == 0)}"
        message = f"{info.num_experts} experts over ep={ep} do not divide"
        yield Finding(code="TC-113", where=where, message=message, hint=hint)
    if serving.tp % ep:
        message = f"tp={serving.tp} is not a multiple of ep={ep}: experts are divided among the ranks of tp"
        hint = f"use --tp {ep} --ep {ep}, or --ep {_largest(ep, lambda n: serving.tp % n == 0)}"
        yield Finding(code="TC-113", where=where, message=message, hint=hint)


def _layers(info: ModelInfo, pp: int) -> Iterator[Finding]:
    layers = info.num_hidden_layers
    if pp > layers:
        message = f"pp={pp} but the model has {layers} layers"
        yield Finding(code="TC-114", where=f"--pp {pp}", message=message, hint=f"use --pp {layers} or less")
    elif layers % pp:
        message = f"{layers} layers over pp={pp} do not divide: the first ranks hold one layer more"
        hint = f"--pp {_largest(pp, lambda n: layers % n == 0)} is balanced"
        yield Finding(code="TC-114", where=f"--pp {pp}", message=message, hint=hint, severity="warning")


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``limit`` that fits; 1 always does."""
    return next((number for number in range(limit, 1, -1) if fits(number)), 1)


def _llm_api_only(target: Target, serving: Serving) -> Iterator[Finding]:
    wishes = {
        "--attention-dp": serving.attention_dp,
        "--moe-backend": serving.moe_backend,
        "--eplb-slots": serving.eplb_slots,
        "--llm-args": serving.llm_args,
    }
    asked = [option for option, value in wishes.items() if value]
    if asked and target.name != "trtllm":
        message = f"{', '.join(asked)}: target {target.name} knows nothing of it"
        hint = "use --target trtllm, or leave it out"
        yield Finding(code="TC-117", where=asked[0], message=message, hint=hint)


def _attention_dp(info: ModelInfo, serving: Serving) -> Iterator[Finding]:
    if not serving.attention_dp:
        return
    where, hint = "--attention-dp", ""
    if serving.tp == 1:
        message = "attention data parallelism over one rank changes nothing"
        hint = "leave it out, or give the number of ranks with --tp"
    elif not info.is_moe:
        message = f"a dense model has no experts to divide: each of the {serving.tp} ranks holds all of it"
        hint = "leave it out: --tp divides the weights"
    else:
        return
    yield Finding(code="TC-117", where=where, message=message, hint=hint, severity="warning")


def _balancing(info: ModelInfo, serving: Serving) -> Iterator[Finding]:
    """TensorRT-LLM asserts in ``MoeLoadBalancerConfig`` (_torch/model_config.py) that all experts have a slot and that
    every rank of ep has the same number of slots."""
    slots, ep = serving.eplb_slots, serving.ep
    where = f"--eplb-slots {slots}"
    if not slots:
        if serving.eplb_layer_updates:
            message = "experts cannot be placed anew without slots to place them in"
            hint = f"add --eplb-slots {info.num_experts + ep}, or more"
            yield Finding(code="TC-118", where="--eplb-layer-updates", message=message, hint=hint)
        return
    least = -(-max(info.num_experts, 1) // ep) * ep
    if not info.is_moe or ep == 1:
        message = "there are no experts on several ranks to balance"
        yield Finding(code="TC-118", where=where, message=message, hint="leave it out, or use --ep")
    elif slots < info.num_experts:
        message = f"{slots} slots are too few for {info.num_experts} experts"
        yield Finding(code="TC-118", where=where, message=message, hint=f"use --eplb-slots {least} or more")
    elif slots % ep:
        message = f"{slots} slots over ep={ep} do not divide"
        yield Finding(
            code="TC-118", where=where, message=message, hint=f"use --eplb-slots {-(-slots // ep) * ep}"
        )


def _prefill(serving: Serving) -> Iterator[Finding]:
    if serving.chunked_prefill or serving.max_seq_len <= serving.max_num_tokens:
        return
    message = (
        f"without chunked prefill a prompt of more than {serving.max_num_tokens} tokens is refused, although "
        f"max_seq_len is {serving.max_seq_len}"
    )
    hint = f"use --chunked-prefill, or --max-num-tokens {serving.max_seq_len}"
    yield Finding(code="TC-119", where="--no-chunked-prefill", message=message, hint=hint, severity="warning")
