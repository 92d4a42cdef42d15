"""Families against transformers: roles from the real module classes, names from the real weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import KINDS
from toolchain.core.errors import UsageError
from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.families import FAMILIES, Family, get_family, is_generic

Tiny = Callable[[str], Path]


def load(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, experts_implementation="eager"
    )


def stored(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def family_of(kind: str, model: Any, names: list[str]) -> Family:
    return get_family(model.config.model_type, type(model).__name__, names)


def role_by_class(model: Any, path: str) -> Role:
    """The role that the classes of transformers give to a module path: the module itself and its parents."""
    pieces = path.split(".")
    chain = [model.get_submodule(".".join(pieces[:count])) for count in range(1, len(pieces) + 1)]
    names = [type(module).__name__ for module in chain]
    leaf = names[-1]
    if any("Experts" in name for name in names):
        return Role.ROUTED_EXPERT
    if "Norm" in leaf:
        return Role.NORM
    if leaf == "Embedding":
        return Role.EMBEDDING
    if path == "lm_head":
        return Role.LM_HEAD
    if any(word in leaf for word in ("Router", "Gate", "TopK", "Topk")) or pieces[-1] == "shared_expert_gate":
        return Role.ROUTER
    if any("Attention" in name for name in names):
        return Role.ATTENTION if leaf == "Linear" else Role.OTHER
    assert any("MLP" in name for name in names[:-1]), (path, names)
    return Role.SHARED_EXPERT if any("shared" in piece for piece in pieces) else Role.DENSE_MLP


def existing_module(model: Any, path: str) -> str:
    """``path``, or the fused experts module that stands for ``....experts.N.gate_proj``."""
    head, separator, _ = path.partition(".experts.")
    return f"{head}.experts" if separator else path


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_the_role_of_its_class_in_transformers(kind: str, tiny: Tiny) -> None:
    model = load(tiny(kind))
    names = sorted(stored(tiny(kind)))
    family = family_of(kind, model, names)
    assert not is_generic(family)
    for name in names:
        module = existing_module(model, family.to_module(name.rpartition(".")[0] or name))
        if name.endswith(".sinks"):
            assert family.classify(name).role is Role.OTHER
        else:
            assert family.classify(name).role is role_by_class(model, module), name


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_names_lead_to_the_weights_that_transformers_loaded(kind: str, tiny: Tiny) -> None:
    """Bit for bit, so that gate, up and down cannot be mixed up; and the way back gives the same name."""
    import torch

    model, tensors = load(tiny(kind)), stored(tiny(kind))
    family = family_of(kind, model, sorted(tensors))
    state = model.state_dict()
    for name, tensor in tensors.items():
        path = family.to_module(name)
        assert family.to_checkpoint(path) == name
        part = family.classify(name)
        if part.expert is None:
            assert torch.equal(state[path], tensor), path
            continue
        experts = path.partition(".experts.")[0] + ".experts"
        projection = path.split(".")[-2]
        if projection == "down_proj":
            found = state[f"{experts}.down_proj"][part.expert]
        else:
            gate, up = state[f"{experts}.gate_up_proj"][part.expert].chunk(2)
            found = {"gate_proj": gate, "up_proj": up}[projection]
        assert torch.equal(found, tensor), path


@pytest.mark.parametrize("kind", KINDS)
def test_folded_norms_feed_only_their_consumers(kind: str, tiny: Tiny) -> None:
    """Scaling a norm by s and its named consumers by 1/s changes no logit: that is what AWQ folding does.

    Powers of two, so that not even rounding differs.
    """
    import torch

    model = load(tiny(kind)).float()
    family = family_of(kind, model, sorted(stored(tiny(kind))))
    tokens = torch.arange(24).reshape(2, 12)
    before = model(tokens).logits
    changed = 0
    for path, layer in model.named_modules():
        if not path.rpartition(".")[0].endswith("layers"):
            continue
        for norm, consumers in family.norm_folds:
            present = [name for name in consumers if has_module(layer, name)]
            if not present or not has_module(layer, norm):
                continue
            weight = layer.get_submodule(norm).weight.data
            scale = 2.0 ** (torch.arange(len(weight)) % 3 - 1)
            weight *= scale
            for name in present:
                layer.get_submodule(name).weight.data /= scale
            changed += len(present)
    after = model(tokens).logits
    assert changed or not family.norm_folds
    assert torch.equal(before, after)


def has_module(layer: Any, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize(("kind", "generic"), [("qwen3_moe", "generic_moe"), ("mixtral", "generic_moe_w123")])
def test_generic_rule_recognises_usual_names_of_an_undeclared_type(
    kind: str, generic: str, tiny: Tiny
) -> None:
    names = sorted(stored(tiny(kind)))
    config = {"n_routed_experts": 4, "moe_intermediate_size": 128}
    family = get_family("unheard_of", "UnheardOfForCausalLM", names, config=config)
    assert family.name == generic
    assert is_generic(family)
    assert (family.num_experts_key, family.moe_intermediate_key) == (
        "n_routed_experts",
        "moe_intermediate_size",
    )
    declared = get_family(KINDS[kind][0].lower().replace("qwen3moe", "qwen3_moe"), "", names)
    assert [family.classify(name) for name in names] == [declared.classify(name) for name in names]


def test_unknown_architecture_says_what_was_and_was_not_recognised(tiny: Tiny) -> None:
    names = [name.replace("mlp.gate_proj", "mlp.c_fc") for name in stored(tiny("llama"))]
    with pytest.raises(UsageError) as caught:
        get_family("gpt9", "GPT9ForCausalLM", names)
    error = caught.value
    assert error.code == "TC-020"
    assert "GPT9ForCausalLM" in error.message
    assert "8 attention" in error.message
    assert "mlp.c_fc" in error.message
    assert "toolchain/families" in error.hint


def test_vision_towers_are_never_quantizable() -> None:
    for name in (
        "vision_model.model.layers.3.self_attn.q_proj.weight",
        "model.visual.blocks.0.mlp.gate_proj.weight",
        "multi_modal_projector.linear_1.weight",
    ):
        for family in FAMILIES:
            assert family.classify(name).role not in QUANTIZABLE


def test_llama4_wrapper_prefix_is_understood() -> None:
    family = get_family("llama4", "Llama4ForConditionalGeneration", [])
    part = family.classify("language_model.model.layers.7.feed_forward.shared_expert.up_proj.weight")
    assert (part.role, part.layer) == (Role.SHARED_EXPERT, 7)
    router = family.classify("language_model.model.layers.7.feed_forward.router.weight")
    assert router.role is Role.ROUTER


def test_families_do_not_claim_the_same_model_type() -> None:
    claimed = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(claimed) == len(set(claimed))


def test_minimax_m2_names_lead_to_real_modules(tmp_path: Path) -> None:
    """M2 shares MiniMax's declaration; its correction bias sits beside the gate, not in it."""
    import torch
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    config = MiniMaxM2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=64,
    )  # fmt: skip
    model = MiniMaxM2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    family = get_family("minimax_m2", "MiniMaxM2ForCausalLM", sorted(tensors))
    for name in tensors:
        assert family.to_checkpoint(family.to_module(name)) == name
        assert family.classify(name).role is not Role.OTHER, name
        if family.classify(name).expert is None:
            assert family.to_module(name) in model.state_dict()
