"""The forward loop of calibration: token batches through the decoder, experts counted."""

from __future__ import annotations

from typing import Any

import torch

from toolchain.core.progress import Progress
from toolchain.quantize.calibration import CalibrationSet
from toolchain.quantize.coverage import Coverage


class CalibrationPass:
    """Callable as ModelOpt wants it: one pass over all calibration tokens. Repeatable; counts the last pass."""

    def __init__(
        self,
        model: Any,
        data: CalibrationSet | None,
        *,
        batch_size: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        # lm_head is calibrated by nobody: the decoder stack alone is enough, and saves a [tokens, vocabulary] matmul.
        self._decoder: Any = model.base_model
        self._batches = data.batches(batch_size) if data else []
        self._device, self._progress = device, progress
        self.coverage = Coverage(model)

    @torch.no_grad()
    def __call__(self, _: Any = None) -> None:
        with self.coverage.counting():
            for batch in self._progress.track(
                self._batches, description="calibrate", total=len(self._batches)
            ):
                self._decoder(input_ids=batch.to(self._device), use_cache=False)
