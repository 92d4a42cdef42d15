"""Arrange the channels between gate/up and down of a gated MLP, so that neighbours round well together.

What the MLP computes does not change, but for the order in which down adds up, when its intermediate channels are put
into another order (rows of gate and up, columns of down), or when a row of up is multiplied by a power of two and the
column of down divided by it. What NVFP4 makes of it does: 16 neighbours share a scale,
for the activations and for the weights of down, and what comes out of a SwiGLU is of very different magnitudes.

``arrange_search.py`` finds order and powers. Ranges that calibration saw hold afterwards: no power is taken that would
leave them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from toolchain.codecs import e2m1
from toolchain.quantize.accuracy.arrange_search import Arrangement, Rounding, Task, batches, search
from toolchain.quantize.accuracy.layers import LayerWalk
from toolchain.recipes import SAMPLE_TOKENS

POWERS = 4
"""Channels are scaled by 2**-POWERS to 2**POWERS."""
HELD_OUT = 4
"""Every so many tokens only judge: an arrangement that does not help them is not taken."""
PARTS = ("gate_proj", "up_proj", "down_proj")


def gated_mlps(modules: dict[str, str], model: nn.Module, formats: set[str]) -> list[str]:
    """Module paths of the MLPs whose three matrices are quantized to one of ``formats``, in model order.

    Without biases: those are copied from the source, in its order.
    """
    found = []
    for path, name in modules.items():
        parent, _, last = path.rpartition(".")
        paths = [f"{parent}.{part}" for part in PARTS]
        if last != PARTS[2] or name not in formats or any(modules.get(item) != name for item in paths):
            continue
        gate, up, down = (model.get_submodule(item) for item in paths)
        if gate.bias is None and up.bias is None and not down.in_features % e2m1.BLOCK:
            found.append(parent)
    return found


@torch.no_grad()
def arrange(model: nn.Module, mlps: list[str], walk: LayerWalk, seed: int) -> dict[str, float]:
    """Arrange ``mlps`` of the layer at hand, in place, also in ``walk.before``.

    Returns the share of the error that is left, by path, of those that were changed.
    """
    samples = {path: Sample(seed) for path in mlps}
    with ExitStack() as stack:
        for path in mlps:
            stack.enter_context(_seen(model.get_submodule(f"{path}.down_proj"), samples[path]))
        walk.run()
    left = {}
    # One after the other: the weights of all experts of a layer in float32 would fill the memory.
    found_tasks = (_task(path, model.get_submodule(path), samples.pop(path)) for path in mlps)
    tasks = (task for task in found_tasks if task is not None)
    for batch in batches(tasks):
        for task, found in zip(batch, search(batch, seed), strict=True):
            share = task.share_left(found)
            if share >= 1.0:
                continue
            left[task.path] = share
            apply(model.get_submodule(task.path), found)
            if walk.before is not None:
                apply(walk.before.get_submodule(task.path.removeprefix(f"{walk.path}.")), found)
    return left


class Sample:
    """At most ``SAMPLE_TOKENS`` of the rows [K] that reach an input, each as likely as another; the range of all."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[torch.Tensor] = []
        self._keys: list[torch.Tensor] = []
        self.peaks: torch.Tensor | None = None
        """[K] float32 largest magnitudes."""

    def add(self, x: torch.Tensor) -> None:
        rows = x.detach().flatten(0, -2)
        if not len(rows):
            return
        peaks = rows.abs().amax(0).float()
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)
        # The rows with the smallest of random numbers are a uniform sample, however the rows come.
        keys = torch.rand(len(rows), generator=self._generator)
        kept = keys.topk(min(SAMPLE_TOKENS, len(rows)), largest=False).indices
        self._rows.append(rows[kept.to(rows.device)])
        self._keys.append(keys[kept])
        if sum(map(len, self._keys)) > 4 * SAMPLE_TOKENS:
            self._thin()

    def rows(self) -> torch.Tensor | None:
        """[n, K] float32; None when no token came."""
        if not self._rows:
            return None
        self._thin()
        return self._rows[0].float()

    def _thin(self) -> None:
        rows, keys = torch.cat(self._rows), torch.cat(self._keys)
        kept = keys.topk(min(SAMPLE_TOKENS, len(keys)), largest=False).indices
        self._rows, self._keys = [rows[kept.to(rows.device)]], [keys[kept]]


@contextmanager
def _seen(module: nn.Module, sample: Sample) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: sample.add(args[0]))
    try:
        yield
    finally:
        handle.remove()


def _task(path: str, mlp: Any, sample: Sample) -> Task | None:
    rows, peaks = sample.rows(), sample.peaks
    if rows is None or peaks is None or len(rows) < 2 * HELD_OUT:
        return None
    judging = torch.arange(len(rows), device=rows.device) % HELD_OUT == 0
    lowest, highest = power_limits(mlp, peaks)
    return Task(
        path=path,
        inputs=rows[~judging],
        judging=rows[judging],
        weight=mlp.down_proj.weight.float(),
        rounding=rounding_of(mlp.down_proj),
        lowest=lowest,
        highest=highest,
    )


def rounding_of(down: Any) -> Rounding:
    """As its quantizers are calibrated."""
    inputs, amax = down.input_quantizer, None
    if inputs.is_enabled and inputs.block_sizes:
        amax = inputs.amax
    return Rounding(
        inputs=None if amax is None else e2m1.global_scale(amax.float().reshape(())),
        weight=e2m1.global_scale(down.weight_quantizer.amax.float().reshape(())),
    )


def power_limits(mlp: Any, peaks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lowest, highest) exponent of each channel [K], float32, under which no calibrated range is left."""
    up, down = mlp.up_proj, mlp.down_proj
    rows, columns = up.weight.float().abs().amax(1), down.weight.float().abs().amax(0)
    highest = _room(rows, up.weight_quantizer.amax)
    if down.input_quantizer.is_enabled and down.input_quantizer.amax is not None:
        highest = torch.minimum(highest, _room(peaks, down.input_quantizer.amax))
    return -_room(columns, down.weight_quantizer.amax), highest


def _room(magnitudes: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """How many doublings [K] keep ``magnitudes`` within ``amax``: 0 to POWERS."""
    ratio = amax.float().reshape(()) / magnitudes.clamp(min=torch.finfo(torch.float32).tiny)
    return ratio.log2().floor().clamp(0, POWERS)


def apply(mlp: Any, found: Arrangement) -> None:
    """Put the rows of gate and up and the columns of down of ``mlp`` where ``found`` says, in place."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    powers = found.powers.to(up.weight.dtype)
    gate.weight.data = gate.weight.data[found.order].contiguous()
    up.weight.data = (up.weight.data * powers.unsqueeze(-1))[found.order].contiguous()
    down.weight.data = (down.weight.data / powers)[:, found.order].contiguous()
