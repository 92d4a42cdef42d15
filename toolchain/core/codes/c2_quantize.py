"""Quantization."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-202": (
        "A format that computes on quantized activations has no calibrated input range",
        "Calibration reached no such module. Use more samples, or a weight-only format.",
    ),
    "TC-203": (
        "The experts of this model are stored in a layout that cannot be split into per-expert matrices",
        "Families with transposed, interleaved or biased fused experts (gpt-oss, Llama 4) can be planned only.",
    ),
}
