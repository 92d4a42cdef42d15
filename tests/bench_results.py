"""Results of benchmarks with chosen figures, for tests that compare and report them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from toolchain.bench.settings import Settings
from toolchain.bench.types import BenchResult, Distribution, Level, Repeat

ENGINE = {
    "name": "mine", "manifest_sha256": "1" * 64, "format": "nvfp4", "target": "local", "model": "a" * 64,
    "architecture": "Qwen3MoeForCausalLM", "kv_cache": "none", "checkpoint_bytes": 2_516_312,
    "kv_bytes_per_token": 2048.0, "parallel": {"tp": 1, "ep": 1, "pp": 1},
}  # fmt: skip
MACHINE = {"cpu": "EPYC", "cpu_cores": 2, "gpus": [], "server": {"name": "triton", "version": "2.51.0"}}


def around(value: float, *, std: float = 0.0, count: int = 32) -> Distribution:
    return Distribution(p50=value, p90=value, p95=value, p99=value, mean=value, std=std, count=count)


def figures(ttft: float = 10.0, tpot: float = 2.0, rate: float = 500.0, **changes: Any) -> dict[str, Any]:
    """The fields of a Summary with these figures; end to end is that of an answer of 33 tokens."""
    count, std = changes.pop("count", 32), changes.pop("std", 0.0)
    times = {"ttft_ms": ttft, "itl_ms": tpot, "tpot_ms": tpot, "e2e_ms": ttft + 32 * tpot}
    found = {
        "requests": count, "errors": 0, "error_messages": {}, "duration_s": 1.0, "prompt_tokens": 64 * count,
        "output_tokens": 33 * count, "output_tokens_per_s": rate, "requests_per_s": rate / 33,
        "user_tokens_per_s": around(1000 / tpot, count=count),
    }  # fmt: skip
    return {
        **found,
        **{name: around(value, std=std, count=count) for name, value in times.items()},
        **changes,
    }


def level(users: int, repeats: Sequence[Mapping[str, Any]], **changes: Any) -> Level:
    """``repeats``: what ``figures`` gives, one for each."""
    first = repeats[0]
    runs = tuple(Repeat(**each) for each in repeats)
    return Level(**{**first, "concurrency": users, "repeats": runs, **changes})


def result(
    levels: Sequence[Level], *, engine: Mapping[str, Any] | None = ENGINE, **changes: Any
) -> BenchResult:
    settings = Settings(concurrency=tuple(each.concurrency or 1 for each in levels), output_tokens=33)
    settings = replace(settings, **changes.pop("settings", {}))
    environment = {
        **MACHINE,
        "engine": None if engine is None else dict(engine),
        **changes.pop("environment", {}),
    }
    known: dict[str, Any] = {
        "created": "2026-11-21T10:00:00+00:00",
        "url": "127.0.0.1:8001",
        "model": "tensorrt_llm",
        "settings": settings,
        "environment": environment,
        "levels": tuple(levels),
    }
    return BenchResult(**{**known, **changes})
