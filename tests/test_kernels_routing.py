"""Choosing experts and sorting by them in Triton's interpreter, against transformers' own routers."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolchain.kernels.settings import LONE_PAIRS
from toolchain.kernels.sorting import Scoring, choose_experts, make_route
from toolchain.modeling.packed.routers import ROUTERS, fuse_routers

MODULES = {
    "Qwen2MoeTopKRouter": "qwen2_moe",
    "Qwen3MoeTopKRouter": "qwen3_moe",
    "OlmoeTopKRouter": "olmoe",
    "MixtralTopKRouter": "mixtral",
    "GptOssTopKRouter": "gpt_oss",
    "DeepseekV3TopkRouter": "deepseek_v3",
    "Glm4MoeTopkRouter": "glm4_moe",
    "MiniMaxM2TopKRouter": "minimax_m2",
}


def router_of(name: str, experts: int, top_k: int, groups: int, normalize: bool) -> Any:
    module = importlib.import_module(f"transformers.models.{MODULES[name]}.modeling_{MODULES[name]}")
    config = SimpleNamespace(
        num_experts_per_tok=top_k, num_experts=experts, num_local_experts=experts, n_routed_experts=experts,
        norm_topk_prob=normalize, hidden_size=32, routed_scaling_factor=2.5, n_group=groups,
        topk_group=groups // 2 or 1,
    )  # fmt: skip
    router = getattr(module, name)(config)
    generator = torch.Generator().manual_seed(experts)
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.dim() == 1 else 1)
    return router.eval()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(("experts", "top_k", "groups"), [(8, 2, 1), (60, 4, 4), (128, 8, 8), (5, 5, 1)])
@pytest.mark.parametrize("normalize", [False, True])
def test_same_choice_and_weights_as_transformers(
    name: str, experts: int, top_k: int, groups: int, normalize: bool
) -> None:
    router = router_of(name, experts, top_k, groups, normalize)
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    rest = (torch.randn(experts) * 0.1,) if name.startswith("MiniMax") else ()
    with torch.no_grad():
        expected = router(hidden, *rest)
        assert fuse_routers(router) == 1
        actual = router(hidden, *rest)
    assert torch.equal(actual[0], expected[0])
    for one, other in ((actual, expected),):
        order, others = one[2].argsort(-1), other[2].argsort(-1)
        assert torch.equal(one[2].gather(1, order), other[2].gather(1, others))
        weights, expected_weights = one[1].gather(1, order), other[1].gather(1, others)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)
        assert one[2].dtype == other[2].dtype and one[1].dtype == other[1].dtype


def test_ties_go_to_the_lower_id() -> None:
    ids, weights = choose_experts(torch.zeros(3, 6), Scoring(scoring="softmax", top_k=2, normalize=True))
    assert ids.tolist() == [[0, 1]] * 3 and torch.allclose(weights, torch.tensor(0.5))


@pytest.mark.parametrize("tokens", [1, 5, 70, 300])
@pytest.mark.parametrize("experts", [3, 16, 100])
@pytest.mark.parametrize("block_m", [16, 64])
def test_every_pair_is_in_one_block_of_its_expert(tokens: int, experts: int, block_m: int) -> None:
    ids = torch.randint(0, experts + 1, (tokens, 2), generator=torch.Generator().manual_seed(tokens))
    route = make_route(ids, experts, block_m)
    seen = []
    for block in range(route.blocks):
        expert = int(route.block_expert[block])
        if expert < 0:
            continue
        begin, rows = int(route.block_begin[block]), int(route.block_rows[block])
        assert 1 <= rows <= block_m
        pairs = route.order[begin : begin + rows].tolist()
        assert {int(ids.flatten()[pair]) for pair in pairs} == {expert}
        seen += pairs
    expected = (ids.flatten() < experts).nonzero().flatten().tolist()
    assert sorted(seen) == expected
    assert route.blocks == ids.numel() if ids.numel() <= LONE_PAIRS else route.blocks <= ids.numel()
