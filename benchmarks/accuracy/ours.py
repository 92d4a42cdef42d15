"""The toolchain's own quantize job, judged by the bytes that it wrote."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.data import LENGTH, SAMPLES, calibration_tokens, tokens_hash
from benchmarks.accuracy.judge import judge
from benchmarks.accuracy.methods import EXPERTS, Method
from benchmarks.accuracy.places import MODELS
from benchmarks.accuracy.stored import describe_stored


def run(model: str, method: Method, seed: int, scratch: Path) -> dict[str, Any]:
    from toolchain.modeling.loading import load_checkpoint
    from toolchain.pipeline.planning import make_request_plan
    from toolchain.pipeline.request import EngineRequest
    from toolchain.quantize.job import quantize

    given = {
        "model": str(MODELS / model),
        "format": method.format,
        "policy": method.policy,
        # The layers that the peers quantize: our defaults protect lead dense layers and give shared experts FP8.
        "protect_first": 0,
        "shared_experts": "bf16" if method.policy == EXPERTS else "same",
        "calib_samples": SAMPLES,
        "calib_length": LENGTH,
        "seed": seed,
    }
    plan = make_request_plan(EngineRequest(**{**given, **method.settings}))
    errors = [str(finding) for finding in plan.findings if finding.severity == "error"]
    if errors:
        raise SystemExit("; ".join(errors))
    started = time.monotonic()
    manifest = quantize(plan, scratch / "checkpoint", device="cpu")
    seconds = round(time.monotonic() - started, 1)
    used = manifest.get("calibration") or {}
    drawn = tokens_hash(calibration_tokens(model, seed))
    read = load_checkpoint(scratch / "checkpoint", device=torch.device("cpu"), dtype=torch.float32)
    return {
        "seconds": seconds,
        "recipe": manifest.get("recipe"),
        "calibration_sha256": used.get("tokens_sha256"),
        "same_calibration": used.get("tokens_sha256") in (None, drawn),
        "stored": describe_stored(scratch / "checkpoint", MODELS / model),
        "judged": "exported bytes",
        **judge(model, lambda ids: read(input_ids=ids, use_cache=False).logits),
    }
