"""What a tensor of a decoder is for: the vocabulary in which families, policies and audits speak."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    ROUTED_EXPERT = "routed_expert"
    SHARED_EXPERT = "shared_expert"
    DENSE_MLP = "dense_mlp"
    ATTENTION = "attention"
    ROUTER = "router"
    """Routers and every kind of gate: mlp.gate, shared_expert_gate, block_sparse_moe.gate, router."""
    NORM = "norm"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    OTHER = "other"
    """Anything else that is kept as it is: biases, sinks, vision towers, MTP heads."""

    # Enum's own is written in Python, and a plan of DeepSeek-V3 looks roles up a million times.
    __hash__ = str.__hash__


QUANTIZABLE = (Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP, Role.ATTENTION)
"""Roles that a policy may quantize. Routers, norms and embeddings never are."""

ASSIGNABLE = (*QUANTIZABLE, Role.LM_HEAD)
"""Roles that a plan may quantize: lm_head only when it is asked for by name."""
