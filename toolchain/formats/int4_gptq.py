"""INT4 by GPTQ: stored exactly as INT4 AWQ, which is the layout that runtimes read (W4A16).

``pre_quant_scale`` is 1 wherever AWQ would store one: TensorRT-LLM's W4A16_AWQ Linear asks for the tensor.
"""

from __future__ import annotations

from dataclasses import replace

from toolchain.formats.int4_awq import INT4_AWQ

INT4_GPTQ = replace(
    INT4_AWQ,
    name="int4_gptq",
    title="INT4, groups of 128, weights only, rounded by GPTQ",
    modelopt_preset="INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    default_recipe="gptq",
)
