"""Whether what was asked of calibration makes sense for this model, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator

from toolchain.core.findings import Finding
from toolchain.models.types import ModelInfo
from toolchain.plan.types import Calibration

MODES = ("routed", "topk", "all")
SAMPLINGS = ("random", "balanced")


def calibration_findings(info: ModelInfo, wanted: Calibration) -> Iterator[Finding]:
    """Errors (TC-160) for values that mean nothing, contradict each other or cannot be reached; a warning (TC-161) for
    options that have no effect on a dense model."""
    problems = list(_problems(wanted)) or list(_reachable(info, wanted))
    for where, message, hint in problems:
        yield Finding(code="TC-160", where=where, message=message, hint=hint)
    asked = [option for option, given in _expert_options(wanted).items() if given]
    if asked and not info.is_moe and not problems:
        message = f"{', '.join(asked)}: the model has no routed experts"
        yield Finding(code="TC-161", where=asked[0], message=message, hint="leave it out", severity="warning")


def _expert_options(wanted: Calibration) -> dict[str, bool]:
    return {
        "--calibrate-experts": wanted.mode != "routed",
        "--min-tokens-per-expert": wanted.min_tokens_per_expert > 0,
        "--sampling": wanted.sampling != "random",
        "--strict": wanted.strict,
    }


def _problems(wanted: Calibration) -> Iterator[tuple[str, str, str]]:
    """(option, what is wrong, what to do)."""
    for option, value, known in (
        ("--calibrate-experts", wanted.mode, MODES),
        ("--sampling", wanted.sampling, SAMPLINGS),
    ):
        if value not in known:
            yield option, f"unknown {value!r}", f"one of {', '.join(known)}"
    if not 0 < wanted.topk_ratio <= 1:
        yield (
            "--calibrate-topk-ratio",
            f"{wanted.topk_ratio} is not in (0, 1]",
            "a share of the experts, such as 0.5",
        )
    elif wanted.topk_ratio != 1 and wanted.mode != "topk":
        yield (
            "--calibrate-topk-ratio",
            f"{wanted.topk_ratio} has no meaning with --calibrate-experts {wanted.mode}",
            "use --calibrate-experts topk",
        )
    if wanted.min_tokens_per_expert < 0:
        yield "--min-tokens-per-expert", f"{wanted.min_tokens_per_expert} is negative", "0 asks for nothing"
    if wanted.min_tokens_per_expert > 0 and wanted.max_samples < wanted.samples:
        yield (
            "--calib-max-samples",
            f"{wanted.max_samples} is less than the {wanted.samples} samples that are drawn in any case",
            f"raise it, or use --calib-samples {wanted.max_samples}",
        )


def _reachable(info: ModelInfo, wanted: Calibration) -> Iterator[tuple[str, str, str]]:
    """A budget gives samples x length x top-k choices per layer; N for every expert takes experts x N of them."""
    minimum, per_sample = wanted.min_tokens_per_expert, wanted.length_tokens * info.num_experts_per_tok
    if not info.is_moe or not minimum or wanted.max_samples * per_sample >= info.num_experts * minimum:
        return
    needed = math.ceil(info.num_experts * minimum / per_sample)
    message = (
        f"{minimum} tokens for each of {info.num_experts} experts cannot be reached: {wanted.max_samples} samples of "
        f"{wanted.length_tokens} tokens with {info.num_experts_per_tok} experts each make "
        f"{wanted.max_samples * per_sample} choices per layer"
    )
    yield (
        "--min-tokens-per-expert",
        message,
        f"--calib-max-samples {needed} is the least, if routing were even",
    )
