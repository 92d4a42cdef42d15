"""Checkpoints that stay packed in GPU memory: what replaces Linears, experts and routers of transformers."""

from toolchain.modeling.packed.loading import (
    NOT_QUANTIZED,
    load_packed,
    why_no_kernels,
    why_not_packed,
    why_not_stored,
)

__all__ = ["NOT_QUANTIZED", "load_packed", "why_no_kernels", "why_not_packed", "why_not_stored"]
