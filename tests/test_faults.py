"""The classic faults of a quantized mixture of experts, planted into every format, mixed checkpoints and fused experts.

In the bytes each is found by the audit; where a plan or a recipe asks for one, nothing is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning import TEXT, plan_for, with_calibration
from tests.tiny import make_tiny
from toolchain.checkpoint.audit import audit
from toolchain.codecs import Calibrated, get_codec
from toolchain.core.errors import ToolchainError
from toolchain.formats import FORMATS, get_format
from toolchain.quantize.job import quantize

Tiny = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A checkpoint without faults, and the names of its parts."""

    kind: str
    format: str
    router: str = "model.layers.0.mlp.gate"
    experts: str = "model.layers.1.mlp.experts"
    fused: bool = False

    @property
    def expert(self) -> tuple[str, ...]:
        """Beginnings of the names of one expert's tensors; of the gate and up of all experts where they are fused."""
        if self.fused:
            return (f"{self.experts}.gate_up_proj",)
        return tuple(f"{self.experts}.2.{name}" for name in ("gate_proj", "up_proj", "down_proj"))

    def name(self, suffix: str, projection: int = 0) -> str:
        """Full name of one tensor of the expert; published MXFP4 has its own."""
        if self.fused and self.format == "mxfp4":
            suffix = {"weight": "blocks", "weight_scale": "scales"}[suffix]
        return f"{self.expert[projection]}{'_' if self.fused else '.'}{suffix}"


SOUND: dict[str, Sound] = {
    **{item.name: Sound(kind="qwen3_moe", format=item.name) for item in FORMATS},
    "mixed": Sound(kind="qwen2_moe", format="nvfp4"),
    **{
        f"gpt_oss {name}": Sound(kind="gpt_oss", format=name, router="model.layers.0.mlp.router", fused=True)
        for name in ("nvfp4", "fp8", "mxfp4")
    },
    "llama4": Sound(
        kind="llama4_text", format="nvfp4", router="model.layers.0.feed_forward.router",
        experts="model.layers.1.feed_forward.experts", fused=True,
    ),
}  # fmt: skip
UNFUSED = [name for name, item in SOUND.items() if not item.fused]
MIXED = ("mixed", "llama4")
"""Shared experts in FP8 beside routed ones in NVFP4."""


@pytest.fixture(scope="module")
def sound(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            item = SOUND[name]
            policy = "all-linear" if name == item.format else None
            made[name] = tmp_path_factory.mktemp("sound") / "out"
            quantize(plan_for(tiny(item.kind), item.format, policy=policy), made[name], device="cpu")
        return made[name]

    return get


@pytest.fixture
def damage(sound: Callable[[str], Path], tmp_path: Path) -> Callable[..., set[str]]:
    """``damage(name, tensors=..., config=...)``: codes of the errors that the audit finds in a changed copy.

    ``config`` gets the exclude list and, where formats are mixed, the named layers; both places are written.
    """

    def run(
        name: str,
        tensors: Callable[[Tensors], Any] = lambda found: None,
        config: Callable[[list[str], dict[str, Any]], Any] = lambda excluded, layers: None,
    ) -> set[str]:
        from safetensors.torch import load_file, save_file

        bad = tmp_path / "bad"
        shutil.copytree(sound(name), bad)
        (bad / "plan.json").unlink()
        found = load_file(bad / "model.safetensors")
        tensors(found)
        save_file({key: tensor.clone() for key, tensor in found.items()}, bad / "model.safetensors")
        places = {"hf_quant_config.json": "quantization", "config.json": "quantization_config"}
        for file, key in places.items():
            if (bad / file).is_file():
                value = json.loads((bad / file).read_text())
                names = ("exclude_modules", "ignore", "modules_to_not_convert")
                config(
                    value[key][next(item for item in names if item in value[key])],
                    value[key].get("quantized_layers", {}),
                )
                (bad / file).write_text(json.dumps(value))
        errors = [item for item in audit(bad).findings if item.severity == "error"]
        shutil.rmtree(bad)
        return {item.code for item in errors}

    return run


@pytest.mark.parametrize("name", SOUND)
def test_without_a_fault_there_is_no_finding(damage: Callable[..., set[str]], name: str) -> None:
    assert damage(name) == set()


@pytest.mark.parametrize("name", SOUND)
def test_a_quantized_router(damage: Callable[..., set[str]], name: str) -> None:
    """All of it consistent: bytes, scales, config. It must not be, that is all."""
    router, codec = SOUND[name].router, get_codec(SOUND[name].format)

    def pack(tensors: Tensors) -> None:
        weight = tensors.pop(f"{router}.weight").float()
        packed = codec.pack(weight, Calibrated(input_amax=torch.tensor(1.0)))
        tensors |= {f"{router}.{suffix}": tensor for suffix, tensor in packed.items()}

    def say(excluded: list[str], layers: dict[str, Any]) -> None:
        if router in excluded:
            excluded.remove(router)
        if layers:
            layers[router] = {"quant_algo": codec.format.quant_algo, "group_size": codec.format.group_size}

    assert "TC-321" in damage(name, pack, say)


@pytest.mark.parametrize("name", SOUND)
def test_one_expert_left_in_bf16(damage: Callable[..., set[str]], tiny: Tiny, name: str) -> None:
    """Listed as unquantized, as an exporter would that skipped it. Where all experts are one tensor: half of them."""
    from safetensors.torch import load_file

    item = SOUND[name]

    def restore(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.startswith(item.expert)]:
            del tensors[key]
        source = load_file(tiny(item.kind) / "model.safetensors")
        tensors |= {key: tensor for key, tensor in source.items() if key.startswith(item.expert)}

    def say(excluded: list[str], layers: dict[str, Any]) -> None:
        excluded.extend(item.expert)
        for module in item.expert:
            layers.pop(module, None)

    assert "TC-322" in damage(name, restore, say)


@pytest.mark.parametrize("name", [name for name in SOUND if get_format(SOUND[name].format).has_input_scale])
def test_an_expert_that_no_token_reached(damage: Callable[..., set[str]], name: str) -> None:
    """As exporters leave it: without an input scale, or with that of a range of zero."""
    key = SOUND[name].name("input_scale")
    assert damage(name, lambda tensors: tensors.pop(key)) == {"TC-310"}
    assert "TC-314" in damage(name, lambda tensors: tensors[key].zero_())


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(name, suffix) for name in UNFUSED for suffix in get_format(SOUND[name].format).equal_in_fused],
)
def test_gate_and_up_in_two_scales(damage: Callable[..., set[str]], name: str, suffix: str) -> None:
    """FP8 runtimes mend it, at the price of a second rounding: there it is a warning."""
    key = SOUND[name].name(suffix, projection=1)
    found = damage(name, lambda tensors: tensors[key].mul_(2))
    assert found == (set() if get_format(SOUND[name].format).requantized_in_fused else {"TC-325"})


@pytest.mark.parametrize("name", SOUND)
def test_a_wrong_prefix_in_the_exclude_list(damage: Callable[..., set[str]], name: str) -> None:
    def say(excluded: list[str], layers: dict[str, Any]) -> None:
        excluded[:] = [f"language_model.{module}" for module in excluded]

    # Where formats are mixed, quantized modules are named one by one, and what no list names is not quantized.
    expected = {"TC-317"} if name in MIXED else {"TC-316", "TC-317"}
    assert damage(name, config=say) == expected


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (name, item.suffix)
        for name in SOUND
        for item in get_format(SOUND[name].format).stored
        if item.scale and not (item.suffix == "pre_quant_scale" and SOUND[name].fused)
    ],
)
def test_a_scale_that_is_not_finite(damage: Callable[..., set[str]], name: str, suffix: str) -> None:
    """Of one expert; in E8M0 the code for NaN. Not a number is not equal to its fused sibling's either."""
    key = SOUND[name].name(suffix)

    def spoil(tensors: Tensors) -> None:
        scale = tensors[key]
        scale.view(-1)[-1:] = 255 if scale.dtype == torch.uint8 else torch.nan

    assert damage(name, spoil) - {"TC-325"} == {"TC-314"}


def starved_source(kind: str, directory: Path) -> Path:
    """The last expert of layer 0 is never chosen. Of router rows (a, -a, ...) half are above zero: a row of zeros never
    wins. gpt-oss has a bias."""
    from safetensors.torch import load_file, save_file

    source = make_tiny(kind, directory, **({"num_local_experts": 6} if kind == "mixtral" else {}))
    tensors = load_file(source / "model.safetensors")
    if kind == "gpt_oss":
        tensors["model.layers.0.mlp.router.bias"][-1] = -1e4
    else:
        weight = tensors[
            f"model.layers.0.{'block_sparse_moe.gate' if kind == 'mixtral' else 'feed_forward.router'}.weight"
        ]
        weight[1], weight[3], weight[-1] = -weight[0], -weight[2], 0
        if kind == "llama4_text":  # one expert per token
            weight[2:] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


STARVED = [
    *(("mixtral", item.name) for item in FORMATS if item.name not in ("fp8", "nvfp4", "int4_awq")),
    *((kind, name) for kind in ("gpt_oss", "llama4_text") for name in ("fp8", "nvfp4", "w4a16_nvfp4")),
    ("gpt_oss", "mxfp4"),
]
"""tests/test_quantize.py and tests/test_calibration.py have the others."""


@pytest.mark.parametrize(("kind", "format_name"), STARVED)
def test_an_expert_without_tokens_is_complete_all_the_same(
    tmp_path: Path, kind: str, format_name: str
) -> None:
    """Counted where anything looks at activations, refused with --strict there, and sound in the bytes."""
    source = starved_source(kind, tmp_path / "model")
    plan = plan_for(source, format_name)
    manifest = quantize(plan, tmp_path / "out", device="cpu")
    verdict = audit(tmp_path / "out", against=source)
    assert verdict.passed, [str(finding) for finding in verdict.findings]
    if manifest["coverage"]:
        layer = json.loads((tmp_path / "out" / "coverage.json").read_text())["layers"]
        (counts,) = [found["tokens"] for path, found in layer.items() if ".layers.0." in path]
        assert counts[-1] == 0 and max(counts) > 0
        with pytest.raises(ToolchainError, match=f"expert {len(counts) - 1} of") as caught:
            quantize(with_calibration(plan, strict=True), tmp_path / "strict", device="cpu")
        assert caught.value.code == "TC-221" and not (tmp_path / "strict").exists()


ROUTER_RECIPE = """
metadata: {recipe_type: ptq}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*.experts.*weight_quantizer', cfg: {num_bits: e4m3}}
    - {quantizer_name: '*.experts.*input_quantizer', cfg: {num_bits: e4m3}}
    - {quantizer_name: '*mlp.gate*weight_quantizer', cfg: {num_bits: e4m3}}
    - {quantizer_name: '*mlp.gate*input_quantizer', cfg: {num_bits: e4m3}}
"""


@pytest.mark.parametrize("command", ["quantize", "engine"])
def test_a_recipe_that_quantizes_a_router_writes_nothing(
    toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path, command: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(ROUTER_RECIPE)
    options = ("--recipe", tmp_path / "recipe.yaml", "--calib-data", TEXT, "--output", tmp_path / "out")
    ran = toolchain(command, tiny("qwen3_moe"), *options)
    assert ran.status == 2 and "TC-150" in ran.err and "*mlp.gate*" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("role", ["router", "norm", "embedding"])
def test_a_plan_that_was_edited_to_quantize_what_never_may_be(tiny: Tiny, tmp_path: Path, role: str) -> None:
    """The file is the user's: whatever it says, the rules are looked at again before anything is loaded."""
    plan = plan_for(tiny("qwen3_moe"), "fp8")
    edited = tuple(replace(item, format="fp8") if item.role == role else item for item in plan.assignments)
    with pytest.raises(ToolchainError, match=role) as caught:
        quantize(replace(plan, assignments=edited), tmp_path / "out", device="cpu")
    assert caught.value.code == "TC-150" and not (tmp_path / "out").exists()
