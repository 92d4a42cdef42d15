"""Fused MoE kernels in the Triton language: quantized weights stay packed, and are decoded in registers."""
