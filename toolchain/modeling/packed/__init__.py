"""Checkpoints that stay packed in GPU memory: what replaces Linears, experts and routers of transformers."""

from toolchain.modeling.packed.loading import load_packed, why_not_packed

__all__ = ["load_packed", "why_not_packed"]
