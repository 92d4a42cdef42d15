"""The engine on what the quantize stage writes: packed weights, quantized activations, FP8 KV cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from toolchain.evaluate.checkpoint import evaluate_checkpoint
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.types import SamplingParams

Tiny = Callable[[str], Path]
PROMPTS = ("def main():\n", "x", "The quick brown fox jumps over the lazy dog. " * 3, "né 漢字 ")


@pytest.fixture(
    scope="module",
    params=[
        ("fp8", "fp8"),
        ("nvfp4", "fp8"),
        ("int4_awq", "none"),
        ("fp8_block", "fp8_cast"),
        ("mxfp8", "nvfp4"),
    ],
    ids=lambda item: item[0],
)
def exported(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toolchain.models.reader import read_model
    from toolchain.plan.planner import make_plan
    from toolchain.plan.types import Calibration
    from toolchain.quantize.job import quantize

    directory = tmp_path_factory.mktemp("quantized")
    (directory / "text.txt").write_text("import os\n\ndef f(x):\n    return x + 1\n" * 100)
    format_name, kv_cache = request.param
    plan = make_plan(
        read_model(str(tiny("qwen3_moe"))),
        format=format_name,
        kv_cache=kv_cache,
        gpu="b200",
        calibration=Calibration(data=str(directory / "text.txt"), samples=4, length_tokens=64),
    )
    quantize(plan, directory / "checkpoint", device="cpu")
    return directory / "checkpoint"


def test_a_crowd_gets_the_tokens_that_the_decoded_model_generates_alone(exported: Path) -> None:
    import torch

    with LocalEngine.load(exported, device="cpu", dtype=torch.float32, max_batch_size=3) as engine:
        expected = []
        for prompt in PROMPTS:
            ids = engine.encode(prompt)
            output = engine.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20)
            expected.append(output[0, len(ids) :].tolist())
        handles = [
            engine.submit(prompt, SamplingParams(max_tokens=20), lambda chunk: None) for prompt in PROMPTS
        ]
        assert [list(handle.result().token_ids) for handle in handles] == expected


def test_quantization_loses_something_and_not_much(exported: Path, tiny: Tiny) -> None:
    """A checkpoint whose scales are ignored has a KL of several nats."""
    report = evaluate_checkpoint(
        exported,
        baseline=tiny("qwen3_moe"),
        data=exported.parent / "text.txt",
        max_tokens=500,
        window=100,
        device="cpu",
        generations=0,
    )
    assert 0 < report["kl_mean"] < 0.2
    assert report["top1_agreement"] > 0.5
