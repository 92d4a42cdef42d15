"""Tiny models with a part that 4-bit blocks cannot hold, for tests of sensitivity and mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import make_tiny

OUTLIER = 60.0


def plant_outliers(kind: str, directory: Path, *, layer: int, **overrides: Any) -> Path:
    """A tiny model whose gate and up projections of ``layer`` have one large weight in every block of 16 inputs.

    The norm before them gives these inputs the value 0: the outliers change nothing but the scale of their block, under
    which the other 15 become zero in E2M1, while E4M3 per tensor still tells them apart.
    """
    from safetensors.torch import load_file, save_file

    source = make_tiny(kind, directory, **overrides)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if f"layers.{layer}." not in name:
            continue
        if name.endswith(("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight")):
            tensor[:, ::16] = OUTLIER * tensor.std()
        elif name.endswith("post_attention_layernorm.weight"):
            tensor[::16] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source
