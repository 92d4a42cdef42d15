"""Precision of float32 matmuls while calibrating: full unless the user allows TensorFloat-32.

TF32 keeps 10 of 23 mantissa bits. It concerns only float32 matmuls (models in float32, routers that compute in float32,
the sums of AWQ and GPTQ), so for a bf16 model it gains little and may move a router's choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


@contextlib.contextmanager
def float32_matmuls(*, allow_tf32: bool) -> Iterator[None]:
    """Set every switch that PyTorch has for it, and set them back at the end.

    PyTorch has two generations of switches over one state; the older getters raise when a program has used both.
    Whatever can be read is restored, the newer one last, because the older one changes it.
    """
    backends = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
    )
    newer = [backend.fp32_precision for backend in backends]
    precision = _readable(torch.get_float32_matmul_precision)
    cudnn = _readable(lambda: torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for backend, value in zip(backends, newer, strict=True):
            backend.fp32_precision = value


def _readable(get: Callable[[], T]) -> T | None:
    try:
        return get()
    except RuntimeError:  # older and newer switches disagree
        return None
