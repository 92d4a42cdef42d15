"""Reading models: against safetensors, what transformers saves, and every kind of broken directory."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import COMMON, KINDS, make_tiny
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.roles import Role
from toolchain.models import ModelInfo, model_identity, read_model, resolve_model

Tiny = Callable[[str], Path]


def config_only(source: Path, directory: Path) -> Path:
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    return directory


def inventory(info: ModelInfo) -> set[tuple[str, tuple[int, ...]]]:
    return {(tensor.name, tensor.shape) for tensor in info.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_headers_say_what_the_safetensors_library_says(kind: str, tiny: Tiny) -> None:
    from safetensors import safe_open

    info = read_model(str(tiny(kind)))
    with safe_open(tiny(kind) / "model.safetensors", framework="pt") as file:
        expected = {
            name: (tuple(part.get_shape()), part.get_dtype())
            for name in file.keys()  # noqa: SIM118 - not a dict
            if (part := file.get_slice(name))
        }
    assert {tensor.name: (tensor.shape, tensor.dtype) for tensor in info.tensors} == expected
    assert info.has_weights
    assert info.has_tokenizer
    assert info.chat_template


@pytest.mark.parametrize("kind", KINDS)
def test_config_alone_gives_the_inventory_of_the_saved_checkpoint(
    kind: str, tiny: Tiny, tmp_path: Path
) -> None:
    saved = read_model(str(tiny(kind)))
    planned = read_model(str(config_only(tiny(kind), tmp_path / "only")))
    assert inventory(planned) == inventory(saved)
    assert set(planned.linears) == set(saved.linears)
    assert not planned.has_weights
    assert (planned.num_experts, planned.num_experts_per_tok) == (
        saved.num_experts,
        saved.num_experts_per_tok,
    )
    assert planned.attention == saved.attention


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_that_transformers_counts(kind: str, tiny: Tiny) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny(kind)))
    # Correction biases of routers are buffers: part of the checkpoint, not of num_parameters().
    buffers = sum(
        value.numel() for name, value in model.state_dict().items() if name.endswith("correction_bias")
    )
    assert read_model(str(tiny(kind))).parameters == model.num_parameters() + buffers


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    tied = make_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    info = read_model(str(tied))
    assert info.tied_embeddings
    assert inventory(read_model(str(config_only(tied, tmp_path / "only")))) == inventory(info)
    assert "lm_head.weight" not in {tensor.name for tensor in info.tensors}


def test_fused_experts_count_one_matrix_per_expert_and_projection(tiny: Tiny) -> None:
    info = read_model(str(tiny("gpt_oss")))
    experts = [linear for linear in info.by_role(Role.ROUTED_EXPERT) if linear.part.layer == 0]
    assert len(experts) == 4 * 3
    stored = sum(
        t.parameters for t in info.tensors if ".layers.0.mlp.experts." in t.name and len(t.shape) == 3
    )
    assert sum(linear.parameters for linear in experts) == stored
    assert {(linear.out_features, linear.in_features) for linear in experts} == {(128, 128)}


def test_multi_token_prediction_layers_are_not_decoder_layers(tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "mtp"
    shutil.copytree(tiny("deepseek_v3"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(128, 256, dtype=torch.bfloat16)
    tensors["model.layers.2.mlp.experts.0.up_proj.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    info = read_model(str(directory))
    assert info.part("model.layers.2.mlp.experts.0.up_proj").role is Role.OTHER
    assert info.part("model.layers.1.mlp.experts.0.up_proj").role is Role.ROUTED_EXPERT
    assert len(info.linears) == len(read_model(str(tiny("deepseek_v3"))).linears)


def test_multimodal_wrapper_is_read_as_its_text_model(tiny: Tiny, tmp_path: Path) -> None:
    """The same decoder inside a wrapper's config: text_config, and a prefix before every name."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "wrapped"
    directory.mkdir()
    inner = json.loads((tiny("llama4_text") / "config.json").read_text())
    inner.pop("architectures")
    wrapper = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": inner,
        "vision_config": {},
    }
    (directory / "config.json").write_text(json.dumps(wrapper))
    tensors = load_file(tiny("llama4_text") / "model.safetensors")
    prefixed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    prefixed["vision_model.model.layers.0.self_attn.q_proj.weight"] = tensors["lm_head.weight"].clone()
    save_file(prefixed, directory / "model.safetensors")
    info, plain = read_model(str(directory)), read_model(str(tiny("llama4_text")))
    assert info.architecture == "Llama4ForConditionalGeneration"
    assert (info.num_experts, info.hidden_size) == (plain.num_experts, plain.hidden_size)
    assert [
        linear.name.removeprefix("language_model.") for linear in sorted(info.linears, key=lambda x: x.name)
    ] == [linear.name for linear in sorted(plain.linears, key=lambda x: x.name)]


@pytest.fixture
def sharded(tiny: Tiny, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    directory = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).save_pretrained(directory, max_shard_size="200KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def test_shards_are_joined(sharded: Path, tiny: Tiny) -> None:
    assert inventory(read_model(str(sharded))) == inventory(read_model(str(tiny("qwen3_moe"))))


def write_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def move_offsets(header: dict[str, Any], by: int) -> None:
    names = sorted(
        (name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )
    header[names[1]]["data_offsets"] = [offset + by for offset in header[names[1]]["data_offsets"]]


def set_entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["lm_head.weight"].__setitem__(key, value)


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut off": (lambda path: truncate(path, 1), "TC-015", "1 are missing"),
    "cut off in the header": (
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        "TC-015",
        "header should have",
    ),
    "empty file": (lambda path: path.write_bytes(b""), "TC-015", "too short"),
    "header too large": (lambda path: path.write_bytes(b"\xff" * 64), "TC-016", "at most 100000000"),
    "not JSON": (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"oops"), "TC-016", "not JSON"),
    "a list": (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "TC-016", "expected an object"),
    "overlap": (lambda p: rewrite_header(p, lambda h: move_offsets(h, -2)), "TC-016", "overlaps"),
    "hole": (lambda p: rewrite_header(p, lambda h: move_offsets(h, 2)), "TC-016", "hole"),
    "wrong size": (lambda p: rewrite_header(p, set_entry("shape", [1, 1])), "TC-016", "needs 2 bytes"),
    "negative": (lambda p: rewrite_header(p, set_entry("shape", [-320, -128])), "TC-016", "-320"),
    "unknown dtype": (lambda p: rewrite_header(p, set_entry("dtype", "BF17")), "TC-016", "BF17"),
    "no offsets": (
        lambda p: rewrite_header(p, lambda h: h["lm_head.weight"].pop("data_offsets")),
        "TC-016",
        "lacks",
    ),
    "bytes after the end": (
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        "TC-016",
        "1 bytes follow",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_shard_is_one_clear_error(case: str, tiny: Tiny, tmp_path: Path) -> None:
    damage, code, words = BROKEN[case]
    directory = tmp_path / "broken"
    shutil.copytree(tiny("llama"), directory)
    damage(directory / "model.safetensors")
    with pytest.raises(ToolchainError, match=r"model\.safetensors") as caught:
        read_model(str(directory))
    assert caught.value.code == code
    assert words in caught.value.message
    assert caught.value.hint


INCONSISTENT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), "are missing: model-00002"),
    "tensor in no shard": (
        lambda d: write_index(d, lambda m: m.__setitem__("model.ghost.weight", m["lm_head.weight"])),
        "model.ghost.weight",
    ),
    "tensor not in index": (lambda d: write_index(d, lambda m: m.pop("lm_head.weight")), "lm_head.weight"),
    "outside": (
        lambda d: write_index(d, lambda m: m.__setitem__("lm_head.weight", "../../etc/x.safetensors")),
        "without a directory",
    ),
    "empty map": (lambda d: write_index(d, lambda m: m.clear()), "no weight_map"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_index_and_shards_that_disagree(case: str, sharded: Path) -> None:
    damage, words = INCONSISTENT[case]
    damage(sharded)
    with pytest.raises(ToolchainError) as caught:
        read_model(str(sharded))
    assert caught.value.code == "TC-017"
    assert words in caught.value.message


def with_config(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(text)
    return directory


def test_directories_that_are_no_models(tiny: Tiny, tmp_path: Path) -> None:
    pickled = config_only(tiny("llama"), tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("hello")
    whole = json.loads((tiny("llama") / "config.json").read_text())
    cases = {
        tmp_path / "absent": ("TC-010", "no directory"),
        tmp_path / "empty": ("TC-012", "empty directory"),
        tmp_path / "other": ("TC-013", "notes.txt"),
        tiny("llama") / "config.json": ("TC-011", "is a file"),
        pickled: ("TC-018", "pytorch_model.bin"),
        with_config(tmp_path / "no_arch", '{"model_type": "llama"}'): ("TC-014", "no architectures"),
        with_config(tmp_path / "arch_list", '{"architectures": []}'): ("TC-014", "[]"),
        with_config(tmp_path / "array", "[1]"): ("TC-014", "list"),
        with_config(tmp_path / "cut", '{"architectures": ["Ll'): ("TC-003", "line 1"),
        with_config(tmp_path / "ghost", '{"architectures": ["GhostForCausalLM"], "model_type": "ghost"}'): (
            "TC-021",
            "GhostForCausalLM",
        ),
    }
    whole.pop("hidden_size")
    lacking = tmp_path / "lacking"
    shutil.copytree(tiny("llama"), lacking)
    (lacking / "config.json").write_text(json.dumps(whole))
    cases[lacking] = ("TC-022", "hidden_size")
    for path, (code, words) in cases.items():
        with pytest.raises(ToolchainError) as caught:
            read_model(str(path))
        assert (caught.value.code, words in caught.value.message) == (code, True), caught.value.message
        assert str(path) in caught.value.message or code in ("TC-018", "TC-022")


def test_identity_follows_config_and_headers(tiny: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny("qwen3_moe"), copy)
    original = model_identity(read_model(str(tiny("qwen3_moe"))))
    assert model_identity(read_model(str(copy))) == original
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert model_identity(read_model(str(copy))) != original
    assert model_identity(read_model(str(tiny("qwen2_moe")))) != original


def test_resolve_model_keeps_a_directory(tiny: Tiny) -> None:
    assert resolve_model(str(tiny("llama"))) == tiny("llama").resolve()
    with pytest.raises(UsageError, match="no directory"):
        resolve_model("./does-not-exist")


def test_mla_cache_is_the_latent(tiny: Tiny) -> None:
    attention = read_model(str(tiny("deepseek_v3"))).attention
    assert attention.kv_elements_per_token_per_layer == 128 + 32


def test_linear_attention_layers_have_no_kv_cache(tmp_path: Path) -> None:
    mixed = make_tiny("minimax", tmp_path / "m", layer_types=["linear_attention", "full_attention"])
    info = read_model(str(mixed))
    assert info.attention.num_layers == 1
    gate = info.part("model.layers.0.self_attn.output_gate")
    assert gate.role is Role.ROUTER
    assert inventory(read_model(str(config_only(mixed, tmp_path / "only")))) == inventory(info)


UNDECLARED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Olmoe": ("olmoe", {"intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}, "generic_moe"),
    "HunYuanMoEV1": (
        "hunyuan",
        {"intermediate_size": 128, "head_dim": 32, "num_experts": 4, "moe_topk": 2},
        "generic_moe",
    ),
    "Gemma2": ("gemma2", {"intermediate_size": 256, "head_dim": 32}, "generic_dense"),
    "SmolLM3": ("smollm3", {"intermediate_size": 256}, "generic_dense"),
}


@pytest.mark.parametrize("prefix", UNDECLARED)
def test_undeclared_models_with_usual_names_are_read(prefix: str, tmp_path: Path) -> None:
    import transformers

    name, settings, family = UNDECLARED[prefix]
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | settings))
    getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(tmp_path / name)
    info = read_model(str(tmp_path / name))
    assert info.family.name == family
    assert inventory(read_model(str(config_only(tmp_path / name, tmp_path / "only")))) == inventory(info)
    assert info.num_experts == settings.get("num_experts", 0)
    kept = {linear.part.projection for linear in info.linears if linear.part.role is Role.ROUTER}
    assert kept <= {"gate", "wg"}


@pytest.mark.parametrize("prefix", ["Phi3", "GraniteMoe"])
def test_unusual_names_are_refused_and_listed(prefix: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{prefix}Config")(**(COMMON | {"intermediate_size": 128}))
    getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError) as caught:
        read_model(str(tmp_path))
    assert caught.value.code == "TC-020"
    strange = {"Phi3": "qkv_proj", "GraniteMoe": "input_linear"}[prefix]
    assert strange in caught.value.message
