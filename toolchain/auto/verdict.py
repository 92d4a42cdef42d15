"""Is the mixed plan better than one format of equal or smaller size? Measured on what each of them ships."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from toolchain.auto.candidates import MIXED
from toolchain.auto.sensitivity import standard_error
from toolchain.auto.tail import Baseline, head_inputs
from toolchain.core.progress import Progress
from toolchain.evaluate.perplexity import vocab_size_of
from toolchain.evaluate.windows import fitting_batch_size
from toolchain.modeling.loading import load_source, pick_device
from toolchain.models.reader import resolve_model
from toolchain.plan.types import Plan
from toolchain.quantize.job import calibrate

NOISE = 2.0
"""Standard errors of the difference that a win must exceed."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    kept: str
    """``mixed``, or the name of the uniform format."""
    reason: str
    measured: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """``mixed`` and uniform formats -> ``kl``, ``kl_stderr``, ``bits``."""
    difference: float | None = None
    """KL of mixed minus that of the best uniform format, mean over windows; ``difference_stderr`` of this mean."""
    difference_stderr: float | None = None


def judge(kl_by_window: Mapping[str, torch.Tensor], bits: Mapping[str, float]) -> Verdict:
    """``kl_by_window``: ``mixed`` and formats -> [windows] KL on the same windows; ``bits`` the same keys."""
    measured: dict[str, dict[str, float | None]] = {
        name: {"kl": float(kl.mean()), "kl_stderr": standard_error(kl), "bits": bits[name]}
        for name, kl in kl_by_window.items()
    }
    rivals = {name: kl for name, kl in kl_by_window.items() if name != MIXED}
    if not rivals:
        return Verdict(kept=MIXED, reason="no uniform format fits the budget", measured=measured)
    best = min(rivals, key=lambda name: float(rivals[name].mean()))
    difference = kl_by_window[MIXED] - rivals[best]
    mean, error = float(difference.mean()), standard_error(difference)
    figures = f"KL {float(kl_by_window[MIXED].mean()):.3e} against {float(rivals[best].mean()):.3e} of {best}"
    noise = f"difference {mean:.2e} ± {error:.1e}" if error is not None else "one window: noise is not known"
    won = error is not None and mean + NOISE * error < 0
    return Verdict(
        kept=MIXED if won else best,
        reason=f"{'better' if won else 'not better'} beyond noise: {figures} ({noise})",
        measured=measured,
        difference=mean,
        difference_stderr=error,
    )


def measure_plans(
    plans: Mapping[str, Plan],
    windows: torch.Tensor,
    *,
    device: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Name -> [windows] KL(source || plan) per window, of each plan as calibrated and about to be exported.

    The calibrated model computes bit for bit what its checkpoint computes (``quantize/backend.py``); tests compare the
    figures with those of written checkpoints.
    """
    first = next(iter(plans.values()))
    target = pick_device(device)
    model: Any = load_source(
        resolve_model(first.model), device=target, dtype=dtype, trust_remote_code=trust_remote_code
    )
    batches = windows.to(target).split(fitting_batch_size(windows.shape[1], vocab_size_of(model)))
    baseline = Baseline([head_inputs(model, batch) for batch in batches], model.get_output_embeddings())
    del model
    found = {}
    for name, plan in plans.items():
        progress.note(f"auto: comparing {name} ({plan.estimates.effective_bits:.2f} bits) with the source")
        quantized: Any = calibrate(
            plan, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress
        ).model
        with torch.no_grad():
            kl = [
                baseline.kl(index, quantized(input_ids=batch, use_cache=False).logits)
                for index, batch in enumerate(batches)
            ]
        found[name] = torch.cat(kl).mean(dim=1)
    return found
