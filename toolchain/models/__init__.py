"""MODEL -> ModelInfo, from headers and config.json alone. See README.md of this room."""

from __future__ import annotations

from toolchain.models.reader import model_identity, read_model, resolve_model
from toolchain.models.types import Attention, LinearInfo, ModelInfo, TensorInfo

__all__ = [
    "Attention",
    "LinearInfo",
    "ModelInfo",
    "TensorInfo",
    "model_identity",
    "read_model",
    "resolve_model",
]
