"""Warm-up is real inferences, counted where the model runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from toolchain.core.errors import ToolchainError
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.warmup import warm_up


@pytest.mark.parametrize("requests", [0, 1, 9])
def test_every_request_passes_through_the_model(tiny: Callable[[str], Path], requests: int) -> None:
    with LocalEngine.load(tiny("qwen3_moe"), device="cpu", max_batch_size=4) as engine:
        rows, longest = [], []

        def seen(module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            rows.append(ids.shape[0])  # type: ignore[union-attr]
            longest.append(ids.shape[1])  # type: ignore[union-attr]

        hook = engine.model.register_forward_pre_hook(seen, with_kwargs=True)
        assert warm_up(engine, requests) == requests
        hook.remove()
        assert max(rows, default=0) == {0: 0, 1: 1, 9: 4}[requests]
        if requests == 9:
            assert max(longest) > 8


def test_an_engine_that_cannot_answer_is_not_ready(tiny: Callable[[str], Path]) -> None:
    with LocalEngine.load(tiny("qwen3_moe"), device="cpu") as engine:

        def broken(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no kernel image")

        engine.model.forward = broken
        with pytest.raises(ToolchainError, match="no kernel image"):
            warm_up(engine, 1)
