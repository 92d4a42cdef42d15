"""Experts that saw too few tokens: what is said of them, what was done, and when that is not accepted."""

from __future__ import annotations

from typing import Any

import torch

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress
from toolchain.formats import get_format
from toolchain.plan.types import Calibration, Plan
from toolchain.quantize.coverage import Coverage

FILE = "coverage.json"
"""Beside the manifest in the checkpoint directory."""
SHOWN = 5
"""Experts named in one message; all of them stand in ``coverage.json``."""


def minimum_tokens(settings: Calibration) -> int:
    """Below this an expert is called starved."""
    return max(1, settings.min_tokens_per_expert)


def remedy(plan: Plan) -> str:
    """What happens to an expert that its router sent too few tokens."""
    if get_format(plan.format).activation == "bf16":
        done = "without any token its weights are rounded to nearest, with few its search has little to go by"
    else:
        # scales.share_expert_inputs
        done = "it takes the largest input range of its layer's experts, as all of them do"
    if plan.calibration.mode == "routed":
        return done
    return f"it is calibrated on tokens that its router sends elsewhere; {done}"


def coverage_report(coverage: Coverage, extra: dict[str, torch.Tensor], plan: Plan) -> dict[str, Any] | None:
    """``coverage.json``; None when no expert was counted: a dense model, or nothing that looks at activations.

    ``extra``: as in ``CalibrationPass``.
    """
    if not coverage.measured or not coverage.experts:
        return None
    settings = plan.calibration
    minimum = minimum_tokens(settings)
    layers = coverage.layers_json(minimum, extra)
    starved = sum(len(layer["starved"]) for layer in layers.values())
    return {
        "schema_version": 1,
        "mode": settings.mode,
        "topk_ratio": settings.topk_ratio if settings.mode == "topk" else None,
        "sampling": settings.sampling,
        "samples": len(coverage.by_sample(next(iter(layers)))),
        "length_tokens": settings.length_tokens,
        "min_tokens_per_expert": settings.min_tokens_per_expert,
        "experts": sum(coverage.experts.values()),
        "min": min(layer["min"] for layer in layers.values()),
        "max": max(layer["max"] for layer in layers.values()),
        "mean": sum(layer["mean"] for layer in layers.values()) / len(layers),
        "cv": sum(layer["cv"] for layer in layers.values()) / len(layers),
        "starved": starved,
        "remedy": remedy(plan) if starved else None,
        "layers": layers,
    }


def manifest_entries(report: dict[str, Any] | None) -> dict[str, Any]:
    """What quantize.json says of ``coverage.json``: all but the layers, and the starved experts by name."""
    if report is None:
        return {"coverage": None, "starved_experts": [], "starved_remedy": None}
    pairs = [[path, expert] for path, layer in report["layers"].items() for expert in layer["starved"]]
    kept = {key: value for key, value in report.items() if key not in ("layers", "remedy")}
    return {
        "coverage": {"file": FILE, **kept},
        "starved_experts": pairs,
        "starved_remedy": report["remedy"],
    }


def tell(coverage: Coverage, plan: Plan, progress: Progress) -> None:
    """One line about the starved experts, if there are any, or about options that decided nothing."""
    settings = plan.calibration
    if not coverage.measured and (settings.strict or settings.min_tokens_per_expert):
        progress.note(
            "nothing of this plan looks at activations: there is no expert coverage to be strict about"
        )
    pairs = coverage.starved(minimum_tokens(plan.calibration))
    if pairs:
        progress.note(f"{describe(pairs, coverage, plan.calibration)}: {remedy(plan)}")


def refuse(coverage: Coverage, settings: Calibration) -> None:
    """ToolchainError TC-221 names the starved experts when ``strict`` accepts none."""
    pairs = coverage.starved(minimum_tokens(settings)) if settings.strict else []
    if pairs:
        raise ToolchainError(
            f"{describe(pairs, coverage, settings)} (--strict)",
            hint="give more or more varied text, raise --calib-max-samples with --min-tokens-per-expert, use "
            "--sampling balanced, or omit --strict",
            code="TC-221",
        )


def describe(pairs: list[tuple[str, int]], coverage: Coverage, settings: Calibration) -> str:
    """``3 of 64 experts saw fewer than 100 calibration tokens: expert 5 of model.layers.0.mlp.experts (12), ...``"""
    minimum, total = minimum_tokens(settings), sum(coverage.experts.values())
    few = "no calibration token" if minimum == 1 else f"fewer than {minimum} calibration tokens"
    tokens = {path: coverage.tokens(path) for path, _ in pairs[:SHOWN]}
    named = ", ".join(
        f"expert {expert} of {path} ({int(tokens[path][expert])})" for path, expert in pairs[:SHOWN]
    )
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    return f"{len(pairs)} of {total} experts saw {few}: {named}{more}"
