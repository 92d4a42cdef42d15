"""How many CPU threads an engine process computes with.

A matmul of a small model is over before a second thread has begun, and threads that wait for work keep a core from the
server and its clients: on 2 idle cores the demo engine gave one user 56 tokens/s in a process with two threads, and 114
through Triton, gRPC and all, from a process with one.
"""

from __future__ import annotations

import os
from typing import Any

SMALL_MATRIX = 2**17
"""Elements. Up to 256 x 256 a second thread gained nothing at 1 and 8 rows, from 512 x 512 on it did (bfloat16,
AVX-512, torch 2.13)."""


def limit_threads(model: Any) -> int:
    """Let torch use one thread where no matrix of a decoder layer is larger than SMALL_MATRIX. Returns the number.

    For processes that only run this model: the number is the process's. OMP_NUM_THREADS has its way.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and _largest_matrix(model) <= SMALL_MATRIX:
        torch.set_num_threads(1)
    return torch.get_num_threads()


def _largest_matrix(model: Any) -> int:
    """Over the weights below a list of layers: embedding and lm_head are one matmul in a step, layers are hundreds."""
    sizes = [
        parameter.shape[-1] * parameter.shape[-2]
        for name, parameter in model.named_parameters()
        if ".layers." in f".{name}" and parameter.dim() >= 2
    ]
    return max(sizes, default=SMALL_MATRIX + 1)
