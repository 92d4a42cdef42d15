"""What is compared: one list. Adding a column of ours is one line at its end.

A *cell* is a format under a policy (``nvfp4/all-linear``): only methods of the same cell are compared, because they
store the same layers in equally many bits (the table shows both, measured from the files). ``reference`` marks the peer
that the acceptance of a cell is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ALL, EXPERTS = "all-linear", "experts-only"
SEEDS = (0, 1, 2)
"""Calibration seeds: which documents are drawn. One is enough where no data is used."""


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    kind: str
    """``source``, ``modelopt``, ``llmcompressor`` or ``ours``."""
    format: str
    policy: str = ALL
    settings: dict[str, Any] = field(default_factory=dict)
    """modelopt: ``preset`` (a name in ``modelopt.torch.quantization``), ``recipe`` (a ModelOpt recipe path), or
    ``algorithm`` to replace the preset's. llmcompressor: ``scheme`` or ``modifier``. ours: keyword arguments of
    EngineRequest."""
    calibrated: bool = True
    """False: no data is used, and every seed gives the same."""

    @property
    def cell(self) -> str:
        return f"{self.format}/{self.policy}"

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS if self.calibrated else SEEDS[:1]


def _modelopt(
    name: str, format: str, *, calibrated: bool = True, both: bool = True, **settings: Any
) -> list[Method]:
    return _twice("modelopt", name, format, both, calibrated=calibrated, settings=settings)


def _peer(
    name: str, format: str, *, calibrated: bool = True, both: bool = True, **settings: Any
) -> list[Method]:
    return _twice("llmcompressor", name, format, both, calibrated=calibrated, settings=settings)


def _ours(
    recipe: str, format: str, *, calibrated: bool = True, both: bool = True, **settings: Any
) -> list[Method]:
    """A recipe of ours; ``settings`` are further keyword arguments of EngineRequest."""
    given = {"recipe": recipe, **settings}
    return _twice("ours", recipe.replace("+", "_"), format, both, calibrated=calibrated, settings=given)


def _twice(
    kind: str, name: str, format: str, both: bool, *, calibrated: bool, settings: dict[str, Any]
) -> list[Method]:
    short = {ALL: "all", EXPERTS: "experts"}
    return [
        Method(
            name=f"{kind}-{format}-{name}-{short[policy]}",
            kind=kind,
            format=format,
            policy=policy,
            settings=settings,
            calibrated=calibrated,
        )
        for policy in ((ALL, EXPERTS) if both else (ALL,))
    ]


METHODS: tuple[Method, ...] = (
    # What arithmetic alone does: the source computed in bfloat16, and by the peer's version of transformers.
    Method(
        name="source-bf16", kind="source", format="source", settings={"dtype": "bfloat16"}, calibrated=False
    ),
    Method(name="source-peer", kind="llmcompressor", format="source", calibrated=False),
    # ModelOpt, W4A4. hf_ptq's default for `--qformat nvfp4` is the first.
    *_modelopt("default", "nvfp4", preset="NVFP4_DEFAULT_CFG"),
    *_modelopt("mse", "nvfp4", preset="NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"),
    *_modelopt("local_hessian", "nvfp4", preset="NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"),
    *_modelopt("four_over_six", "nvfp4", preset="NVFP4_FOUR_OVER_SIX_CFG"),
    *_modelopt(
        "act_headroom", "nvfp4", preset="NVFP4_DEFAULT_CFG", algorithm={"method": "nvfp4_act_headroom"}
    ),
    *_modelopt("awq_lite", "nvfp4", both=False, preset="NVFP4_AWQ_LITE_CFG"),
    *_modelopt(
        "gptq",
        "nvfp4",
        both=False,
        preset="NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
        algorithm={"method": "gptq", "layerwise": {"enable": True}},
    ),
    # ModelOpt, W4A16.
    *_modelopt("default", "w4a16_nvfp4", calibrated=False, preset="W4A16_NVFP4_CFG"),
    # ModelOpt, FP8 and INT4.
    *_modelopt("default", "fp8", preset="FP8_DEFAULT_CFG"),
    *_modelopt(
        "default",
        "fp8_per_channel_per_token",
        calibrated=False,
        both=False,
        preset="FP8_PER_CHANNEL_PER_TOKEN_CFG",
    ),
    *_modelopt("default", "int4_awq", preset="INT4_AWQ_CFG"),
    # llm-compressor.
    *_peer("default", "nvfp4", scheme="NVFP4"),
    *_peer("gptq", "nvfp4", scheme="NVFP4", modifier="gptq"),
    *_peer("awq", "nvfp4", scheme="NVFP4", modifier="awq"),
    *_peer("default", "w4a16_nvfp4", calibrated=False, scheme="NVFP4A16"),
    *_peer("gptq", "w4a16_nvfp4", scheme="NVFP4A16", modifier="gptq"),
    *_peer("awq", "w4a16_nvfp4", scheme="NVFP4A16", modifier="awq"),
    *_peer("default", "fp8", scheme="FP8"),
    *_peer("default", "fp8_per_channel_per_token", calibrated=False, both=False, scheme="FP8_DYNAMIC"),
    *_peer("default", "int4_awq", scheme="W4A16", modifier="awq"),
    # Ours. One line per recipe: a string of ingredients joined by +.
    *_ours("max", "nvfp4"),
    *_ours("mse", "nvfp4", both=False),
    *_ours("four_over_six", "nvfp4", both=False),
    *_ours("local_hessian", "nvfp4", both=False),
    *_ours("pinned", "nvfp4", calibrated=False, both=False),
    *_ours("gptq", "nvfp4", both=False),
    *_ours("compensate+gptq", "nvfp4"),
    *_ours("compensate+local_hessian+gptq", "nvfp4"),
    *_ours("max", "w4a16_nvfp4", calibrated=False, both=False),
    *_ours("window", "w4a16_nvfp4", calibrated=False, both=False),
    *_ours("mse", "w4a16_nvfp4", calibrated=False, both=False),
    *_ours("gptq", "w4a16_nvfp4", both=False),
    *_ours("local_hessian+gptq", "w4a16_nvfp4"),
    *_ours("compensate+local_hessian+gptq", "w4a16_nvfp4"),
    *_ours("max", "fp8"),
    *_ours("gptq", "fp8", both=False),
    *_ours("compensate+gptq", "fp8"),
    *_ours("max", "fp8_per_channel_per_token", calibrated=False, both=False),
    *_ours("compensate+gptq", "fp8_per_channel_per_token", both=False),
    *_ours("awq", "int4_awq"),
    *_ours("awq+clip+gptq", "int4_awq"),
    *_ours("compensate+clip+gptq", "int4_awq", both=False),
    # Formats that no peer writes on a CPU: our default against what may be better.
    *_ours("gptq", "int4_gptq", both=False),
    *_ours("compensate+clip+gptq", "int4_gptq", both=False),
    *_ours("awq", "w4a8_awq", both=False),
    *_ours("awq+clip+gptq", "w4a8_awq", both=False),
    *_ours("compensate+clip+gptq", "w4a8_awq", both=False),
    *_ours("max", "w4a8_nvfp4_fp8", both=False),
    *_ours("compensate+local_hessian+gptq", "w4a8_nvfp4_fp8", both=False),
    *_ours("max", "mxfp4", calibrated=False, both=False),
    *_ours("compensate+local_hessian+gptq", "mxfp4", both=False),
    *_ours("max", "mxfp8", calibrated=False, both=False),
    *_ours("compensate+gptq", "mxfp8", both=False),
    *_ours("max", "fp8_block", calibrated=False, both=False),
    *_ours("compensate+gptq", "fp8_block", both=False),
    *_ours("smoothquant", "int8_sq", both=False),
    *_ours("smoothquant+gptq", "int8_sq", both=False),
    *_ours("max", "int8_wo", calibrated=False, both=False),
    *_ours("compensate+gptq", "int8_wo", both=False),
)
BY_NAME = {method.name: method for method in METHODS}
REFERENCES = {
    "ModelOpt": "modelopt-{format}-default",
    "llm-compressor": "llmcompressor-{format}-default",
    "our default": "ours-{format}-{recipe}",
}
"""Whom the table's ratios are against, in the same cell: the peers' defaults, and the format's default recipe."""
