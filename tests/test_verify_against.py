"""`verify --against`: errors against ModelOpt's own decoding, and what rounding does not explain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import plan_for
from toolchain.checkpoint.audit import Verdict, audit
from toolchain.formats import FORMATS
from toolchain.quantize.job import quantize

Tiny = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts.2.down_proj"
SHIPPED = [
    *(("qwen3_moe", item.name) for item in FORMATS),
    ("llama", "int4_awq"), ("llama", "int8_sq"), ("mixtral", "nvfp4"), ("deepseek_v3", "fp8_block"),
    ("gpt_oss", "nvfp4"), ("gpt_oss", "mxfp4"), ("llama4_text", "fp8"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, ...], Path] = {}

    def get(kind: str, format_name: str, recipe: str | None = None) -> Path:
        key = (kind, format_name, recipe or "")
        if key not in made:
            made[key] = tmp_path_factory.mktemp("sound") / "out"
            quantize(plan_for(tiny(kind), format_name, recipe=recipe), made[key], device="cpu")
        return made[key]

    return get


def load(directory: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def changed(source: Path, target: Path, change: Callable[[Tensors], Any], *, foreign: bool = False) -> Path:
    """A copy with other tensors; ``foreign``: as if made elsewhere, by nobody knows which recipe."""
    from safetensors.torch import save_file

    shutil.copytree(source, target)
    for name in ("plan.json", *(("quantize.json",) if foreign else ())):
        (target / name).unlink()
    tensors = load(target)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def said(verdict: Verdict) -> set[tuple[str, str, str]]:
    return {(item.code, item.where, item.severity) for item in verdict.findings}


@pytest.mark.parametrize(("kind", "format_name"), SHIPPED)
def test_what_is_written_here_is_within_rounding(
    sound: Callable[..., Path], tiny: Tiny, kind: str, format_name: str
) -> None:
    """Channel scales, folded norms, fused experts and corrected weights included."""
    verdict = audit(sound(kind, format_name), against=tiny(kind))
    assert verdict.passed, [str(item) for item in verdict.findings]
    (found,) = verdict.errors["by_format"].values()
    assert 0 < found["median_relative_error"] <= found["max_relative_error"] < 0.3
    moved = format_name == "int4_gptq"
    assert {item.code for item in verdict.findings} <= {"TC-327", *(("TC-348",) if moved else ())}


def test_errors_of_nvfp4_are_those_of_modelopts_own_decoding(sound: Callable[..., Path], tiny: Tiny) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    stored, source = load(sound("qwen3_moe", "nvfp4")), load(tiny("qwen3_moe"))
    verdict = audit(sound("qwen3_moe", "nvfp4"), against=tiny("qwen3_moe"), top=1000)
    assert len(verdict.errors["worst"]) == 24
    for row in verdict.errors["worst"]:
        packed, wanted = stored[f"{row['name']}.weight"], source[f"{row['name']}.weight"].float()
        decoded = NVFP4QTensor(wanted.shape, torch.float32, packed).dequantize(
            dtype=torch.float32,
            scale=stored[f"{row['name']}.weight_scale"],
            double_scale=stored[f"{row['name']}.weight_scale_2"],
            block_sizes={-1: 16},
        )
        difference = decoded - wanted
        assert row["relative_error"] == pytest.approx(float(difference.norm() / wanted.norm()), rel=1e-4)
        blocks = difference.unflatten(1, (-1, 16)).norm(dim=-1) / wanted.unflatten(1, (-1, 16)).norm(dim=-1)
        assert row["worst_block"] == pytest.approx(float(blocks.max()), rel=1e-4)
        at = divmod(int(blocks.argmax()), blocks.shape[1])
        assert row["worst_block_at"] == [at[0], at[1] * 16]
    values = [row["relative_error"] for row in verdict.errors["worst"]]
    assert values == sorted(values, reverse=True)


def test_errors_of_fp8_and_awq_by_their_definition(sound: Callable[..., Path], tiny: Tiny) -> None:
    stored, source = load(sound("llama", "fp8")), load(tiny("llama"))
    for row in audit(sound("llama", "fp8"), against=tiny("llama")).errors["worst"]:
        wanted = source[f"{row['name']}.weight"].double()
        decoded = stored[f"{row['name']}.weight"].double() * stored[f"{row['name']}.weight_scale"]
        assert row["relative_error"] == pytest.approx(
            float((decoded - wanted).norm() / wanted.norm()), rel=1e-4
        )
    stored = load(sound("llama", "int4_awq"))
    rows = audit(sound("llama", "int4_awq"), against=tiny("llama"), top=99).errors["worst"]
    row = next(row for row in rows if row["name"].endswith("layers.0.self_attn.q_proj"))
    packed, scale = stored[f"{row['name']}.weight"].int(), stored[f"{row['name']}.weight_scale"].double()
    codes = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1)
    codes = torch.where(codes > 7, codes - 16, codes).double() * scale.repeat_interleave(128, 1)
    norm = "model.layers.0.input_layernorm.weight"
    codes *= stored[norm].double() / source[norm].double()
    wanted = source[f"{row['name']}.weight"].double()
    assert row["relative_error"] == pytest.approx(float((codes - wanted).norm() / wanted.norm()), rel=1e-3)


def roll(tensors: Tensors) -> None:
    tensors[f"{EXPERT}.weight"] = tensors[f"{EXPERT}.weight"].view(torch.uint8).roll(1, 0).view(
        tensors[f"{EXPERT}.weight"].dtype
    )  # fmt: skip


def scaled(suffix: str, factor: float) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.{suffix}"] = (tensors[f"{EXPERT}.{suffix}"].float() * factor).to(
            tensors[f"{EXPERT}.{suffix}"].dtype
        )

    return change


@pytest.mark.parametrize(
    ("format_name", "change"),
    [
        ("nvfp4", roll), ("fp8", roll), ("int4_awq", roll), ("fp8_block", roll), ("mxfp4", roll),
        ("nvfp4", scaled("weight_scale_2", 2)), ("nvfp4", scaled("weight_scale_2", 0.5)),
        ("fp8", scaled("weight_scale", 1.25)), ("int4_awq", scaled("weight_scale", 1.5)),
        ("int4_gptq", roll), ("nvfp4", lambda t: t[f"{EXPERT}.weight"].zero_()),
    ],
)  # fmt: skip
def test_another_matrix_and_a_stale_scale_are_found(
    sound: Callable[..., Path], tiny: Tiny, tmp_path: Path, format_name: str, change: Callable[[Tensors], Any]
) -> None:
    """Every tensor is well formed: only the source tells. GPTQ may move weights, not swap rows."""
    bad = changed(sound("qwen3_moe", format_name), tmp_path / "bad", change)
    assert audit(bad).passed
    assert ("TC-348", EXPERT, "error") in said(audit(bad, against=tiny("qwen3_moe")))


def test_two_experts_swapped(sound: Callable[..., Path], tiny: Tiny, tmp_path: Path) -> None:
    def swap(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.0." in name and ".experts.1." in name]:
            other = name.replace(".experts.1.", ".experts.3.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    bad = changed(sound("qwen3_moe", "nvfp4"), tmp_path / "bad", swap)
    found = [item.where for item in audit(bad, against=tiny("qwen3_moe")).findings if item.code == "TC-348"]
    assert len(found) == 6 and all(".experts.1." in name or ".experts.3." in name for name in found)


def test_fused_experts_that_were_swapped(sound: Callable[..., Path], tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"

    def swap(tensors: Tensors) -> None:
        for suffix in ("", "_weight_scale"):
            tensors[f"{name}{suffix}"] = (
                tensors[f"{name}{suffix}"].view(torch.uint8).roll(1, 0).view(tensors[f"{name}{suffix}"].dtype)
            )

    bad = changed(sound("gpt_oss", "nvfp4"), tmp_path / "bad", swap)
    found = [item.where for item in audit(bad, against=tiny("gpt_oss")).findings if item.code == "TC-348"]
    assert found == [f"model.layers.0.mlp.experts.{expert}.down_proj" for expert in range(4)]


def test_small_corrections_are_reported_and_do_not_fail(
    sound: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    """Some 1.5 times of what rounding reaches: an error here, where the recipe is known to be plain rounding; a warning
    where nobody knows, and where a recipe moves weights."""

    def nudge(tensors: Tensors) -> None:
        scaled("weight_scale", 1.09)(tensors)

    plain = changed(sound("qwen3_moe", "fp8"), tmp_path / "plain", nudge)
    assert ("TC-348", EXPERT, "error") in said(audit(plain, against=tiny("qwen3_moe")))
    foreign = changed(sound("qwen3_moe", "fp8"), tmp_path / "foreign", nudge, foreign=True)
    verdict = audit(foreign, against=tiny("qwen3_moe"))
    assert verdict.passed and ("TC-348", EXPERT, "warning") in said(verdict)
    path = plain / "quantize.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": "compensate"}))
    assert audit(plain, against=tiny("qwen3_moe")).passed


def test_factors_that_were_folded_somewhere_else(
    sound: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    """As AWQ of others does with v_proj and o_proj: the matrix is the source's but for a factor per row.
    Checkpoints made here fold into norms only: there it is wrong."""
    factors = 2.0 ** torch.randint(-2, 3, (128, 1), generator=torch.Generator().manual_seed(0))

    def fold(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.weight_scale"] = tensors[f"{EXPERT}.weight_scale"] * factors

    ours = changed(sound("qwen3_moe", "int4_awq"), tmp_path / "ours", fold)
    assert ("TC-348", EXPERT, "error") in said(audit(ours, against=tiny("qwen3_moe")))
    bad = changed(sound("qwen3_moe", "int4_awq"), tmp_path / "bad", fold, foreign=True)
    verdict = audit(bad, against=tiny("qwen3_moe"))
    assert verdict.passed and ("TC-349", EXPERT, "warning") in said(verdict)


def test_missing_and_foreign_tensors_are_listed(
    sound: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.layers.0.mlp.gate.weight"]
        tensors["model.extra.weight"] = torch.zeros(2)
        tensors[f"{EXPERT}.weight"] = tensors[f"{EXPERT}.weight"][:, :-8]

    found = said(
        audit(changed(sound("qwen3_moe", "nvfp4"), tmp_path / "bad", change), against=tiny("qwen3_moe"))
    )
    assert ("TC-326", "model.layers.0.mlp.gate.weight", "error") in found
    assert ("TC-350", "model.extra.weight", "warning") in found
    assert ("TC-351", EXPERT, "error") in found


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
def test_the_table_of_worst_offenders(
    toolchain: Callable[..., Any], sound: Callable[..., Path], tiny: Tiny, kind: str
) -> None:
    words = ("verify", sound(kind, "nvfp4"), "--against", tiny(kind))
    ran = toolchain(*words, "--top", 3)
    assert ran.status == 0 and "rounding reaches" in ran.out and "worst block" in ran.out
    assert len(toolchain(*words, "--top", 3, "--json").json["errors"]["worst"]) == 3
