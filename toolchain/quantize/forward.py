"""The forward loop of calibration: token batches through the decoder, experts counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from toolchain.core.progress import Progress
from toolchain.plan.types import Calibration
from toolchain.quantize.calibration import CalibrationSet
from toolchain.quantize.coverage import Coverage
from toolchain.quantize.routing import Widening


class CalibrationPass:
    """Callable as ModelOpt wants it: one pass over all calibration tokens. Repeatable; counts the last pass."""

    def __init__(
        self,
        model: Any,
        data: CalibrationSet | None,
        *,
        settings: Calibration,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._model = model
        self.batches = data.batches(settings.batch_size) if data else []
        self._length = data.tokens.shape[1] if data else 1
        self.device, self._progress = device, progress
        self.coverage = Coverage(model)
        self.widening = Widening(model, settings)
        self.extra: dict[str, torch.Tensor] = {}
        """Experts module path -> int64 [num_experts]: tokens of the last pass that an expert saw beyond the routed."""

    @torch.no_grad()
    def __call__(self, _: Any = None) -> None:
        # Where lm_head is not quantized, the decoder stack alone is enough, and saves a [tokens, vocabulary] matmul.
        head = getattr(self._model.get_output_embeddings(), "input_quantizer", None)
        part = self._model if head is not None and head.is_enabled else self._model.base_model
        batches = self._progress.track(self.batches, description="calibrate", total=len(self.batches))
        with self.counting():
            for batch in batches:
                part(input_ids=batch.to(self.device), use_cache=False)

    @contextlib.contextmanager
    def counting(self, inside: str = "") -> Iterator[None]:
        """Count one pass, over the whole model or over the layer at ``inside``."""
        with self.coverage.counting(self._length, inside), self.widening.active(inside):
            yield
        self.extra |= self.widening.extra


@torch.no_grad()
def route(
    model: Any,
    batches: Iterable[torch.Tensor],
    length_tokens: int,
    device: torch.device,
    *,
    enough: Callable[[Coverage], bool] = lambda coverage: False,
) -> Coverage:
    """Send ``batches`` through the unquantized decoder until ``enough`` says so after one of them."""
    coverage = Coverage(model)
    with coverage.counting(length_tokens):
        for batch in batches:
            model.base_model(input_ids=batch.to(device), use_cache=False)
            if enough(coverage):
                break
    return coverage
