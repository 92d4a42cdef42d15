"""The matrix: every format x every model kind x policies, and KV caches, really quantized, audited and run.

``docs/matrix.json`` is what a run of it found (`make test-matrix`); the README's tables are made from that file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.planning import TEXT
from tests.tiny import KINDS, make_fp8_source, make_llama4_wrapper, make_mxfp4_source, make_tiny
from toolchain.core.files import atomic_write_text
from toolchain.core.findings import errors
from toolchain.formats import FORMATS, KV_CACHES, get_format
from toolchain.models.reader import read_model
from toolchain.plan.planner import make_plan
from toolchain.plan.policy import default_policy
from toolchain.plan.types import Calibration, Plan

RECORD = Path(__file__).parent.parent / "docs" / "matrix.json"
VARIANTS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "deepseek_v3 in fp8": ("deepseek_v3", make_fp8_source),
    "gpt_oss in mxfp4": ("gpt_oss", make_mxfp4_source),
    "llama4 multimodal": ("llama4_text", lambda _, directory: make_llama4_wrapper(directory)),
    "minimax lightning": (
        "minimax",
        lambda _, directory: make_tiny(
            "minimax", directory, layer_types=["linear_attention", "full_attention"]
        ),
    ),
}
"""What releases look like beyond the kinds: quantized already, in a wrapper, with linear attention. Name -> the kind,
and what makes it from the tiny model of that kind."""
MODELS = (*KINDS, *VARIANTS)
KV_FORMATS = ("fp8", "nvfp4")
"""Formats with which every KV cache is run."""
SAMPLES, LENGTH = 8, 64
"""Calibration: enough for statistics, not for accuracy; random weights have none to lose."""
GENERATED = 8
"""Tokens that the local engine generates, compared with transformers one by one."""
LARGEST_ERROR = 0.8
"""Of logits against the source, relative. Scales that are read wrongly give noise of the size of the logits."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    model: str
    """A kind of tests/tiny.py, or one of ``VARIANTS``."""
    format: str
    policy: str
    kv_cache: str = "none"

    def __str__(self) -> str:
        return f"{self.model}, {self.format}, {self.policy}, KV cache {self.kv_cache}"


LOSSLESS = tuple(
    Cell(model="gpt_oss in mxfp4", format=name, policy="experts-only") for name in ("mxfp4", "w4a16_nvfp4")
)
"""Copied, or cast exactly, and nothing rounds activations: the logits are those of the source."""


def cells(model: str, *, is_moe: bool) -> Iterator[Cell]:
    """All that is run of one model: formats x (default policy, all-linear), and KV caches with two formats."""
    for item in FORMATS:
        for policy in dict.fromkeys((default_policy(item, is_moe=is_moe).name, "all-linear")):
            yield Cell(model=model, format=item.name, policy=policy)
    for name in KV_FORMATS:
        policy = default_policy(get_format(name), is_moe=is_moe).name
        for kv_cache in KV_CACHES:
            if kv_cache != "none":
                yield Cell(model=model, format=name, policy=policy, kv_cache=kv_cache)


def make_source(model: str, tiny: Callable[[str], Path], directory: Path) -> Path:
    """The source of ``model``; variants are made in ``directory``."""
    if model not in VARIANTS:
        return tiny(model)
    kind, make = VARIANTS[model]
    return make(tiny(kind), directory / "model")


def plan_cell(cell: Cell, source: Path) -> Plan:
    """The plan of a cell, with what it refuses in ``findings``."""
    return make_plan(
        read_model(str(source)),
        format=cell.format,
        policy=cell.policy,
        kv_cache=cell.kv_cache,
        calibration=Calibration(data=str(TEXT), samples=SAMPLES, length_tokens=LENGTH),
    )


def refusals(plan: Plan) -> list[dict[str, str]]:
    """Code and message of every error of a plan; empty: it can be done."""
    return [{"code": item.code, "message": item.message} for item in errors(plan.findings)]


def run_cell(cell: Cell, source: Path, output: Path) -> dict[str, Any]:
    """``refused`` of the record: empty when it is quantized, audited and run; AssertionError when one of them fails."""
    from toolchain.checkpoint.audit import audit
    from toolchain.quantize.job import quantize

    plan = plan_cell(cell, source)
    refused = refusals(plan)
    if not refused:
        quantize(plan, output, device="cpu")
        verdict = audit(output, against=source)
        assert verdict.passed, [str(finding) for finding in verdict.findings]
        _run(source, output, lossless=cell in LOSSLESS)
    return {**asdict(cell), "refused": refused}


def _run(source: Path, checkpoint: Path, *, lossless: bool) -> None:
    """The local engine on ``checkpoint``: close to the source, and the tokens that transformers generates."""
    import torch

    from toolchain.modeling.loading import load_source
    from toolchain.runtime.engine import LocalEngine
    from toolchain.runtime.types import SamplingParams

    plain = load_source(source, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(4, 260, (2, 96), generator=torch.Generator().manual_seed(0))
    with LocalEngine.load(checkpoint, device="cpu", dtype=torch.float32) as engine, torch.no_grad():
        ours, expected = engine.model(tokens).logits, plain(tokens).logits
        error = float((ours - expected).norm() / expected.norm())
        assert error == 0 if lossless else 0 < error < LARGEST_ERROR, f"logits differ by {error:.3g}"
        ids = engine.encode("def main():\n")
        wanted = engine.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=GENERATED)
        params = SamplingParams(max_tokens=GENERATED)
        found = [*ids, *(token for chunk in engine.stream(ids, params) for token in chunk.token_ids)]
        assert found == wanted[0].tolist(), (found, wanted)


def describe(source: Path) -> dict[str, Any]:
    """What the record says about one model."""
    info = read_model(str(source))
    return {"family": info.family.name, "architecture": info.architecture, "moe": info.is_moe}


def read_record() -> dict[str, Any]:
    """``docs/matrix.json``; an empty one where there is none yet."""
    if not RECORD.is_file():
        return {"models": {}, "cells": []}
    return json.loads(RECORD.read_text(encoding="utf-8"))


def record(model: str, about: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Put the results of one model into the record, in the order of ``MODELS``; one line per cell."""
    found = read_record()
    models = {**found["models"], model: about}
    rows = [row for row in found["cells"] if row["model"] != model] + results
    lines = {
        "versions": {
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            **{name: version(name) for name in ("torch", "transformers", "nvidia-modelopt")},
        },
        "calibration": {"samples": SAMPLES, "length_tokens": LENGTH},
        "models": {name: models[name] for name in MODELS if name in models},
    }
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in lines.items())
    rows = [row for name in MODELS for row in rows if row["model"] == name]
    body = ",\n".join(json.dumps(row) for row in rows)
    atomic_write_text(RECORD, f'{{\n{head},\n"cells": [\n{body}\n]\n}}\n')
