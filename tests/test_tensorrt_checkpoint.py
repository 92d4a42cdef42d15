"""Rank files for trtllm-build: every number of the unified checkpoint is there, in the rank that computes with it.

Independent of the code under test: both sides are dequantized here, from raw tensors and the definitions of the
formats, and the shares of the ranks are put together again by the layout that TensorRT-LLM documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.planning import plan_for
from tests.tiny import make_tiny
from toolchain.build.tensorrt import Parallel, write_legacy_checkpoint
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.quantize.job import quantize

WIDE = dict(hidden_size=512, num_attention_heads=8, intermediate_size=512, num_hidden_layers=2)
"""Groups of 128 along in_features that four ranks can share."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Tensors = dict[str, torch.Tensor]
Make = Callable[[str, str, str], Path]


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``unified(kind, format, kv)``: a quantized checkpoint of a tiny model. Read only."""
    made: dict[tuple[str, ...], Path] = {}

    def get(kind: str, format: str, kv: str = "none") -> Path:
        key = (kind, format, kv)
        if key not in made:
            root = tmp_path_factory.mktemp("-".join(key))
            source = make_tiny(kind, root / "model", **(WIDE if kind in ("llama", "qwen3") else {}))
            plan = plan_for(source, format, kv_cache=kv, policy="all-linear")
            quantize(plan, root / "checkpoint", device="cpu")
            made[key] = root / "checkpoint"
        return made[key]

    return get


def read_all(checkpoint: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def nibbles(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = packed.view(torch.uint8).long()
    return codes % 16, codes // 16


def decode(weight: torch.Tensor, scale: torch.Tensor | None, scale_2: torch.Tensor | None) -> torch.Tensor:
    """Values of a weight [..., out, in] by the definition of what its dtype and scales say."""
    if scale is None:
        return weight.float()
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale.float().reshape((-1, 1, 1) if weight.dim() == 3 else ())
    if scale.dtype == torch.float8_e4m3fn:  # NVFP4: blocks of 16 along the input, two elements in a byte
        values = E2M1[torch.stack(nibbles(weight), -1).flatten(-2)]
        assert scale_2 is not None
        return values * (scale.float() * scale_2.float()).repeat_interleave(16, -1)
    if scale.dim() == 1:  # INT8, a scale per output channel
        return weight.float() * scale[:, None]
    low, high = nibbles(weight)  # INT4: two output channels in a byte
    signed = torch.stack((low, high), -2).flatten(-3, -2).float()
    signed = torch.where(signed > 7, signed - 16, signed)
    return signed * scale.float().repeat_interleave(128, -1)


def linear(tensors: Tensors, module: str) -> torch.Tensor:
    """Values of a Linear of either kind of checkpoint."""
    scale = tensors.get(f"{module}.weight_scale", tensors.get(f"{module}.weights_scaling_factor"))
    second = tensors.get(f"{module}.weight_scale_2", tensors.get(f"{module}.weights_scaling_factor_2"))
    weight = tensors[f"{module}.weight"]
    if weight.dtype in (torch.bfloat16, torch.float32):
        return weight.float()
    return decode(weight, scale, second)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What was written, by the rank's place: ``files[pp][tp]``."""

    config: dict[str, Any]
    files: list[list[Tensors]]

    def row(self, layer: int, layers: int, module: str) -> list[torch.Tensor]:
        """A module's values on each rank of tp, on the stage that has the layer."""
        each = layers // len(self.files)
        return [
            linear(file, f"transformer.layers.{layer % each}.{module}") for file in self.files[layer // each]
        ]


def convert(checkpoint: Path, output: Path, **parallel: int) -> Ranks:
    wished = Parallel(**parallel)
    write_legacy_checkpoint(checkpoint, output, wished)
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted(["config.json", *(f"rank{rank}.safetensors" for rank in range(wished.world_size))])
    files = [
        [load_file(output / f"rank{stage * wished.tp + rank}.safetensors") for rank in range(wished.tp)]
        for stage in range(wished.pp)
    ]
    return Ranks(config=json.loads((output / "config.json").read_text()), files=files)


def heads_of(config: dict[str, Any]) -> tuple[int, int, int]:
    heads = config["num_attention_heads"]
    return heads, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads


def check_attention(before: Tensors, config: dict[str, Any], ranks: Ranks, layer: int) -> None:
    """qkv of rank r: its queries, then its keys and values; a key head that several ranks share is on all of them."""
    heads, kv_heads, size = heads_of(config)
    stored = f"model.layers.{layer}.self_attn"
    q, k, v = (linear(before, f"{stored}.{name}_proj").unflatten(0, (-1, size)) for name in "qkv")
    fused = ranks.row(layer, config["num_hidden_layers"], "attention.qkv")
    tp = len(fused)
    mine, shared = heads // tp, max(1, kv_heads // tp)
    for rank, found in enumerate(fused):
        first = rank * kv_heads // tp
        parts = (q[rank * mine : (rank + 1) * mine], k[first : first + shared], v[first : first + shared])
        assert torch.equal(found, torch.cat(parts).flatten(0, 1)), (layer, rank)
    dense = ranks.row(layer, config["num_hidden_layers"], "attention.dense")
    assert torch.equal(torch.cat(dense, -1), linear(before, f"{stored}.o_proj"))


def check_dense_mlp(before: Tensors, config: dict[str, Any], ranks: Ranks, layer: int) -> None:
    for old, new, axis in (("gate_proj", "fc", 0), ("up_proj", "gate", 0), ("down_proj", "proj", 1)):
        found = torch.cat(ranks.row(layer, config["num_hidden_layers"], f"mlp.{new}"), axis)
        assert torch.equal(found, linear(before, f"model.layers.{layer}.mlp.{old}")), (layer, new)


def check_rest(before: Tensors, config: dict[str, Any], ranks: Ranks) -> None:
    """Norms on every rank, embeddings and head cut along a vocabulary that is padded with zeros."""
    vocabulary = config["vocab_size"]
    table = torch.cat([file["transformer.vocab_embedding.weight"] for file in ranks.files[0]])
    assert (
        torch.equal(table[:vocabulary], before["model.embed_tokens.weight"]) and not table[vocabulary:].any()
    )
    head = torch.cat([file["lm_head.weight"] for file in ranks.files[-1]])
    expected = before.get("lm_head.weight", before["model.embed_tokens.weight"])
    assert torch.equal(head[:vocabulary], expected) and not head[vocabulary:].any()
    each = config["num_hidden_layers"] // len(ranks.files)
    for stage, files in enumerate(ranks.files):
        for file in files:
            assert ("transformer.vocab_embedding.weight" in file) == (stage == 0)
            assert ("lm_head.weight" in file) == (stage == len(ranks.files) - 1)
            for layer in range(each):
                stored, name = f"model.layers.{stage * each + layer}", f"transformer.layers.{layer}"
                for old, new in (
                    ("input_layernorm", "input_layernorm"),
                    ("post_attention_layernorm", "post_layernorm"),
                ):
                    assert torch.equal(file[f"{name}.{new}.weight"], before[f"{stored}.{old}.weight"])


DENSE = [
    ("llama", "fp8", "fp8"), ("llama", "nvfp4", "fp8"), ("llama", "int4_awq", "none"), ("llama", "w4a8_awq", "none"),
    ("llama", "int8_sq", "none"), ("qwen3", "fp8", "none"),
]  # fmt: skip


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize(("kind", "format", "kv"), DENSE)
def test_dense_ranks_hold_the_numbers_of_the_unified_checkpoint(
    unified: Make, tmp_path: Path, kind: str, format: str, kv: str, tp: int, pp: int
) -> None:
    checkpoint = unified(kind, format, kv)
    before, config = read_all(checkpoint), json.loads((checkpoint / "config.json").read_text())
    ranks = convert(checkpoint, tmp_path / "out", tp=tp, pp=pp)
    for layer in range(config["num_hidden_layers"]):
        check_attention(before, config, ranks, layer)
        check_dense_mlp(before, config, ranks, layer)
    check_rest(before, config, ranks)
    assert ranks.config["mapping"] == {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    if kind == "qwen3":
        norm = ranks.files[0][0]["transformer.layers.0.attention.q_layernorm.weight"]
        assert torch.equal(norm, before["model.layers.0.self_attn.q_norm.weight"])


@pytest.mark.parametrize(
    ("tp", "pp", "ep"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 1, 2), (4, 1, 2), (2, 2, 2)]
)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_experts_are_divided_by_ep_and_cut_by_the_rest_of_tp(
    unified: Make, tmp_path: Path, kind: str, tp: int, pp: int, ep: int
) -> None:
    checkpoint = unified(kind, "fp8", "none")
    before, config = read_all(checkpoint), json.loads((checkpoint / "config.json").read_text())
    ranks = convert(checkpoint, tmp_path / "out", tp=tp, pp=pp, ep=ep)
    count = config.get("num_experts", config.get("num_local_experts"))
    layers, moe_tp = config["num_hidden_layers"], tp // ep
    parent, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if kind == "mixtral":
        parent, names = "block_sparse_moe", ("w1", "w3", "w2")
    for layer in range(layers):
        check_attention(before, config, ranks, layer)
        fc, proj = (ranks.row(layer, layers, f"mlp.{name}") for name in ("fc", "proj"))
        for expert in range(count):
            group, place = divmod(expert, count // ep)
            # Ranks of one ep group: tp_rank % ep is the group, tp_rank // ep the part of each expert.
            mine = [rank for rank in range(tp) if rank % ep == group]
            gate, up, down = (
                linear(before, f"model.layers.{layer}.{parent}.experts.{expert}.{name}") for name in names
            )
            halves = [fc[rank][place].chunk(2) for rank in mine]
            assert torch.equal(torch.cat([half[0] for half in halves]), up)
            assert torch.equal(torch.cat([half[1] for half in halves]), gate)
            assert torch.equal(torch.cat([proj[rank][place] for rank in mine], -1), down)
        assert fc[0].shape[0] == count // ep and fc[0].shape[1] == 2 * gate.shape[0] // moe_tp
    check_rest(before, config, ranks)
    check_one_input_scale(before, ranks, kind, parent, names, count)
    assert ranks.config["mapping"] | {"moe_tp_size": moe_tp, "moe_ep_size": ep} == ranks.config["mapping"]
    if kind == "qwen2_moe":
        check_shared_expert(before, ranks)


def check_one_input_scale(
    before: Tensors, ranks: Ranks, kind: str, parent: str, names: tuple[str, ...], count: int
) -> None:
    """Of all experts of the layer, the largest; and the router in float32."""
    file = ranks.files[0][-1]
    name = f"model.layers.0.{parent}.experts"
    largest = max(
        before[f"{name}.{expert}.{part}.input_scale"].item() for expert in range(count) for part in names[:2]
    )
    assert file["transformer.layers.0.mlp.fc.activation_scaling_factor"].tolist() == [pytest.approx(largest)]
    router = file["transformer.layers.0.mlp.router.weight"]
    assert router.dtype == torch.float32
    assert torch.equal(router, before[f"model.layers.0.{parent}.gate.weight"].float())


def check_shared_expert(before: Tensors, ranks: Ranks) -> None:
    """fc of each rank: its part of up, then its part of gate."""
    stored, name = "model.layers.0.mlp.shared_expert", "transformer.layers.0.mlp.shared_expert"
    halves = [linear(file, f"{name}.fc").chunk(2) for file in ranks.files[0]]
    for index, old in enumerate(("up_proj", "gate_proj")):
        assert torch.equal(torch.cat([half[index] for half in halves]), linear(before, f"{stored}.{old}"))
    down = torch.cat([linear(file, f"{name}.proj") for file in ranks.files[0]], -1)
    assert torch.equal(down, linear(before, f"{stored}.down_proj"))


def test_scales_and_channel_factors(unified: Make, tmp_path: Path) -> None:
    """W4A8: every Linear has all five; a row-parallel one's factor is cut with it, and is 1 where a norm took it."""
    checkpoint = unified("llama", "w4a8_awq", "none")
    before = read_all(checkpoint)
    ranks = convert(checkpoint, tmp_path / "out", tp=2)
    layer, stored = "transformer.layers.0", "model.layers.0"
    first, second = ranks.files[0]
    factors = [file[f"{layer}.attention.dense.prequant_scaling_factor"] for file in (first, second)]
    assert torch.equal(
        torch.cat(factors), before[f"{stored}.self_attn.o_proj.pre_quant_scale"].to(torch.bfloat16)
    )
    ones = first[f"{layer}.attention.qkv.prequant_scaling_factor"]
    assert f"{stored}.self_attn.q_proj.pre_quant_scale" not in before and bool((ones == 1).all())
    for old, new in (
        ("input_scale", "activation_scaling_factor"),
        ("weight_scale_2", "weights_scaling_factor_2"),
    ):
        assert first[f"{layer}.mlp.proj.{new}"].tolist() == [before[f"{stored}.mlp.down_proj.{old}"].item()]
    quantization = ranks.config["quantization"]
    assert quantization["quant_algo"] == "W4A8_AWQ" and quantization["group_size"] == 128
    assert quantization["pre_quant_scale"] is True and quantization["has_zero_point"] is False


def test_the_kv_cache_has_the_larger_scale_of_keys_and_values(unified: Make, tmp_path: Path) -> None:
    checkpoint = unified("llama", "fp8", "fp8")
    before = read_all(checkpoint)
    ranks = convert(checkpoint, tmp_path / "out", tp=2)
    scales = [
        before[f"model.layers.1.self_attn.{name}"].item() for name in ("k_proj.k_scale", "v_proj.v_scale")
    ]
    for file in ranks.files[0]:
        found = file["transformer.layers.1.attention.kv_cache_scaling_factor"]
        assert found.tolist() == [max(scales)]
    assert ranks.config["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_a_vocabulary_that_does_not_divide_is_padded(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "model", vocab_size=321, tie_word_embeddings=True)
    ranks = convert(source, tmp_path / "out", tp=2)
    assert ranks.config["vocab_size"] == 321 and ranks.config["quantization"]["quant_algo"] is None
    check_rest(read_all(source), json.loads((source / "config.json").read_text()), ranks)
    assert ranks.files[0][0]["lm_head.weight"].shape[0] == 161


def test_unequal_scales_in_a_fused_matmul(unified: Make, tmp_path: Path) -> None:
    """FP8 weights are rounded again under the largest, as TensorRT-LLM does; inputs that disagree are refused."""
    before = read_all(unified("llama", "fp8", "none"))
    name = "model.layers.0.self_attn.k_proj"
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("config.json", "hf_quant_config.json"):
        (broken / file).write_text((unified("llama", "fp8", "none") / file).read_text())
    save_file(
        {**before, f"{name}.weight_scale": before[f"{name}.weight_scale"] / 2}, broken / "model.safetensors"
    )
    qkv = convert(broken, tmp_path / "out").files[0][0]
    rows = linear({**before, f"{name}.weight_scale": before[f"{name}.weight_scale"] / 2}, name)
    found = linear(qkv, "transformer.layers.0.attention.qkv")[512 : 512 + rows.shape[0]]
    # E4M3 has 3 bits of mantissa: half a unit in the last place is 1/16 of the value at most, above its subnormals.
    floor = before[f"{name}.weight_scale"].item() * 2**-10
    assert ((found - rows).abs() <= rows.abs() / 16 + floor).all()
    save_file(
        {**before, f"{name}.input_scale": before[f"{name}.input_scale"] / 2}, broken / "model.safetensors"
    )
    with pytest.raises(ToolchainError, match="input_scale differs") as caught:
        convert(broken, tmp_path / "other")
    assert caught.value.code == "TC-421" and not (tmp_path / "other").exists()


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("written", "base", "scaling"),
    [
        ({"rope_theta": 500000.0}, 500000.0, None),
        ({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 500000.0, "llama3"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}, 5e5, "llama3"),
    ],
)
def test_rotary_settings_of_both_generations_of_config(
    tmp_path: Path, tiny: Callable[[str], Path], written: dict[str, Any], base: float, scaling: str | None
) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, transformers 5 writes rope_parameters."""
    source = tmp_path / "model"
    source.mkdir()
    config = json.loads((tiny("llama") / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope_")}
    (source / "config.json").write_text(json.dumps({**config, **written}))
    (source / "model.safetensors").symlink_to(tiny("llama") / "model.safetensors")
    made = convert(source, tmp_path / "out").config
    assert made["rotary_base"] == base
    found = made["rotary_scaling"]
    assert (found or {}).get("type") == scaling and (found is None or LLAMA3.items() <= found.items())


def test_what_is_not_quantized_is_excluded_by_name(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    """Attention in bf16, MLPs in FP8: TensorRT-LLM matches the names of its modules with these patterns (fnmatch)."""
    from fnmatch import fnmatchcase

    quantize(plan_for(tiny("llama"), "fp8", policy="mlp-only"), tmp_path / "checkpoint", device="cpu")
    ranks = convert(tmp_path / "checkpoint", tmp_path / "out", tp=2, pp=2)
    patterns = ranks.config["quantization"]["exclude_modules"]
    for files in ranks.files:
        for name, tensor in files[0].items():
            module, _, suffix = name.rpartition(".")
            if suffix == "weight" and tensor.dim() > 1:
                excluded = any(fnmatchcase(module, pattern) for pattern in patterns)
                assert excluded == (tensor.dtype == torch.bfloat16), name
    assert ranks.files[0][0]["transformer.layers.0.attention.qkv.weight"].dtype == torch.bfloat16


def test_what_has_no_such_checkpoint_is_refused(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="DeepseekV3ForCausalLM"):
        write_legacy_checkpoint(tiny("deepseek_v3"), tmp_path / "out", Parallel())
    assert not (tmp_path / "out").exists()
