"""CUDA SM versions by the names that TensorRT-LLM's documents use."""

from __future__ import annotations

AMPERE = (80, 86, 87)
ADA = (89,)
HOPPER = (90,)
B200, B300 = 100, 103
BLACKWELL = (B200, B300)
RTX, SPARK = 120, 121
BLACKWELL_RTX = (RTX, SPARK)
ALL_SMS = (*AMPERE, *ADA, *HOPPER, *BLACKWELL, *BLACKWELL_RTX)
