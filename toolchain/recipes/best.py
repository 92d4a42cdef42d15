"""The recipe that our own measurements show best, per format: held-out KL on models of three families
(``benchmarks/accuracy``, benchmarks/results/accuracy.json).

A format is listed only when a recipe beats its default on every one of them by more than the noise of windows and
seeds; the others keep their default.
"""

from __future__ import annotations

BEST: dict[str, str] = {
    "nvfp4": "compensate+local_hessian+gptq",
    "w4a16_nvfp4": "compensate+local_hessian+gptq",
    "w4a8_nvfp4_fp8": "compensate+local_hessian+gptq",
    "mxfp4": "compensate+local_hessian+gptq",
    "mxfp8": "compensate+gptq",
    "fp8": "compensate+gptq",
    "fp8_block": "compensate+gptq",
    "fp8_per_channel_per_token": "compensate+gptq",
    "int4_awq": "awq+clip+gptq",
    "w4a8_awq": "compensate+clip+gptq",
}
