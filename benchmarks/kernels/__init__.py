"""Fused MoE kernels against BF16 transformers, dequantize-then-multiply and the limits of the card. See README.md."""
