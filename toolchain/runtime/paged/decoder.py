"""One token for every row of a batch: run, or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolchain.runtime.paged.attention import stepping
from toolchain.runtime.paged.pages import KvPages, Step, StepCache

WARMUPS = 2
"""Runs before a capture: kernels are compiled and libraries take their memory."""


@dataclass(kw_only=True)
class _Inputs:
    """Of a batch of one size, always in the same memory: a graph reads it again."""

    host: torch.Tensor
    """int32 [3, rows]: tokens, slots, lengths."""
    device: torch.Tensor


@dataclass(kw_only=True)
class _Graph:
    graph: Any
    logits: torch.Tensor


class Decoder:
    """Steps of a model over pages. ``graphs``: ``try_out`` captures a graph for each size of batch."""

    def __init__(
        self,
        model: Any,
        pages: KvPages,
        *,
        device: torch.device,
        max_rows: int,
        graphs: bool,
        options: dict[str, Any],
    ) -> None:
        self._model, self._pages, self._device = model, pages, device
        self._sizes = sizes_up_to(max_rows)
        self._options = options
        self._mask = torch.zeros((1, 1, 1, 1), device=device)
        """Of four dimensions: transformers hands it on as it is, and attention over pages needs none."""
        self._inputs: dict[int, _Inputs] = {}
        self._graphs: dict[int, _Graph] = {}
        self._capture = graphs
        self._memory: Any = None
        """Of all graphs together."""

    def step(self, tokens: Sequence[int], slots: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Feed ``tokens[i]`` to the row in slot ``slots[i]``, its position ``lengths[i]`` - 1; logits [rows, V]."""
        rows = len(tokens)
        size = next(size for size in self._sizes if rows <= size)
        inputs = self._fill(size, tokens, slots, lengths)
        captured = self._graphs.get(size)
        if captured is None:
            return self._run(inputs)[:rows]
        captured.graph.replay()
        return captured.logits[:rows]

    def try_out(self) -> str | None:
        """One step that belongs to nobody, and the capture of every size of batch; why some cannot be captured, if so.

        All of them now: a capture compiles kernels, takes memory and may fail, which no request should wait for.
        Raises NotPaged, or whatever a failing step raises."""
        self._run(self._fill(self._sizes[0], [], [], []))
        if not self._capture:
            return None
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        failed: dict[int, Exception] = {}
        # The largest first: the others' memory then comes out of what it took.
        for size in reversed(self._sizes):
            try:
                self._graphs[size] = self._captured(self._fill(size, [], [], []))
            except Exception as error:  # noqa: BLE001 - the same steps run without graphs, slower
                failed[size] = error
                if stream is not None:
                    torch.cuda.set_stream(stream)  # a capture that cannot be ended keeps its own
        if not failed:
            return None
        sizes, first = ", ".join(map(str, sorted(failed))), next(iter(failed.values()))
        return f"at {sizes} rows, {type(first).__name__}: {first}"

    def _fill(
        self, size: int, tokens: Sequence[int], slots: Sequence[int], lengths: Sequence[int]
    ) -> _Inputs:
        if size not in self._inputs:
            host = torch.zeros((3, size), dtype=torch.int32, pin_memory=self._device.type == "cuda")
            self._inputs[size] = _Inputs(host=host, device=host.to(self._device))
        inputs = self._inputs[size]
        more = size - len(tokens)
        scratch = self._pages.pool.slots
        # The copy before this one has ended: its logits were read.
        inputs.host[0] = torch.tensor([*tokens, *[0] * more], dtype=torch.int32)
        inputs.host[1] = torch.tensor([*slots, *[scratch] * more], dtype=torch.int32)
        inputs.host[2] = torch.tensor([*lengths, *[1] * more], dtype=torch.int32)
        inputs.device.copy_(inputs.host, non_blocking=True)
        return inputs

    def _run(self, inputs: _Inputs) -> torch.Tensor:
        tokens, slots, lengths = inputs.device
        step = Step(slots=slots, lengths=lengths)
        with stepping(self._pages, step):
            output = self._model(
                input_ids=tokens.long().unsqueeze(1),
                attention_mask=self._mask,
                position_ids=(lengths - 1).long().unsqueeze(1),
                past_key_values=StepCache(self._pages, step),
                use_cache=True,
                **self._options,
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _captured(self, inputs: _Inputs) -> _Graph:
        """Running a step again before it counts does no harm: it writes the same keys and values."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                self._run(inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._run(inputs)
        if self._memory is None:
            self._memory = graph.pool()
        return _Graph(graph=graph, logits=logits)


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64 and so on: rows that a batch is filled up to."""
    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128) if size < most]
    sizes += list(range(192, most, 64))
    return [*sizes, most]
