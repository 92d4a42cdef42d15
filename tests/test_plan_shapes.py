"""Plans of models that exist, from their config.json alone: widths, sizes and memory by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.architectures import Architectures
from toolchain.models import ModelInfo
from toolchain.plan import Plan, Serving, make_plan


@pytest.fixture(scope="session")
def published(architectures: Architectures) -> dict[str, ModelInfo]:
    names = {"Qwen3-30B-A3B": "qwen3-30b-a3b", "DeepSeek-V3": "deepseek-v3"}
    return {title: architectures.get(name) for title, name in names.items()}


def plan_30b(published: dict[str, ModelInfo], **request: Any) -> Plan:
    settings = {"format": "nvfp4", "gpu": "b200", "target": "trtllm"} | request
    return make_plan(published["Qwen3-30B-A3B"], **settings)


def messages(plan: Plan) -> str:
    return "\n".join(str(finding) for finding in plan.findings)


def test_block_128_over_tp_8(published: dict[str, ModelInfo]) -> None:
    serving = Serving(max_batch_size=8, max_seq_len=4096, tp=8)
    found = messages(plan_30b(published, format="int4_awq", gpu="h100", target="local", serving=serving))
    assert "moe_intermediate_size 768 over tp=8 gives 96 per rank, not a multiple of 128" in found
    assert "use --tp 2 (384) or --ep 8" in found
    # The hint is true: both choices leave no finding about widths.
    for tp, ep in ((2, 1), (8, 8)):
        serving = Serving(max_batch_size=8, max_seq_len=4096, tp=tp, ep=ep)
        assert "per rank" not in messages(plan_30b(published, format="int4_awq", gpu="h100", serving=serving))


def test_nvfp4_blocks_of_16_survive_tp_8(published: dict[str, ModelInfo]) -> None:
    plan = plan_30b(published, serving=Serving(max_batch_size=8, max_seq_len=4096, tp=8))
    assert [item.code for item in plan.findings] == ["TC-144"], "only: there are no weights"


def test_experts_only_nvfp4_is_about_five_and_a_half_bits(published: dict[str, ModelInfo]) -> None:
    """28.99e9 of 30.53e9 parameters at 4.5 bits, the rest at 16."""
    estimates = plan_30b(published).estimates
    assert estimates.quantized_parameters == 48 * 128 * 3 * 768 * 2048
    rest = estimates.parameters - estimates.quantized_parameters
    scalars = 48 * 128 * 3 * 8
    assert estimates.checkpoint_bytes == estimates.quantized_parameters * 9 // 16 + rest * 2 + scalars
    assert estimates.effective_bits == pytest.approx(5.08, abs=0.01)


def test_kv_cache_of_grouped_query_attention_and_of_mla(published: dict[str, ModelInfo]) -> None:
    serving = Serving(max_batch_size=4, max_seq_len=1000)
    plain = plan_30b(published, serving=serving).estimates
    halved = plan_30b(published, serving=serving, kv_cache="fp8").estimates
    assert plain.kv_cache_per_gpu_bytes == 4 * 1000 * 48 * 2 * 4 * 128 * 2
    assert halved.kv_cache_per_gpu_bytes * 2 == plain.kv_cache_per_gpu_bytes
    # Four KV heads over eight ranks: each head is held twice, so a rank has a quarter and not an eighth.
    cut = plan_30b(published, serving=Serving(max_batch_size=4, max_seq_len=1000, tp=8)).estimates
    assert cut.kv_cache_per_gpu_bytes * 4 == plain.kv_cache_per_gpu_bytes
    for tp in (1, 8):
        serving = Serving(max_batch_size=4, max_seq_len=1000, tp=tp)
        latent = make_plan(
            published["DeepSeek-V3"], format="fp8", gpu="b200", target="trtllm", serving=serving
        )
        assert latent.estimates.kv_cache_per_gpu_bytes == 4 * 1000 * 61 * (512 + 64) * 2


def test_deepseek_v3_in_nvfp4_needs_four_b200(published: dict[str, ModelInfo]) -> None:
    def codes(tp: int) -> list[str]:
        serving = Serving(max_batch_size=16, max_seq_len=8192, tp=tp, ep=tp)
        plan = make_plan(
            published["DeepSeek-V3"], format="nvfp4", gpu="b200", target="trtllm", serving=serving
        )
        return [item.code for item in plan.findings if item.severity == "error"]

    assert codes(1) == ["TC-130"]
    assert codes(2) == ["TC-130"]
    assert codes(4) == []
    assert codes(8) == []


def test_a_gpu_that_is_too_small_names_what_fits(published: dict[str, ModelInfo]) -> None:
    serving = Serving(max_batch_size=256, max_seq_len=32768)
    plan = plan_30b(published, serving=serving)
    (finding,) = [item for item in plan.findings if item.code == "TC-130"]
    batch = int(finding.hint.split("--max-batch-size ")[1].split()[0])
    fits = plan_30b(published, serving=Serving(max_batch_size=batch, max_seq_len=32768))
    over = plan_30b(published, serving=Serving(max_batch_size=batch + 1, max_seq_len=32768))
    assert "TC-130" not in messages(fits)
    assert "TC-130" in messages(over)


def test_mla_has_no_place_for_kv_scales(published: dict[str, ModelInfo]) -> None:
    plan = make_plan(published["DeepSeek-V3"], format="fp8", kv_cache="fp8", gpu="h200", target="trtllm")
    assert "TC-116" in messages(plan)
    assert "TC-116" not in messages(plan_30b(published, kv_cache="fp8"))
