"""The diffs of CONTRIBUTING.md are code that works: they are taken from the page and run."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Module name -> module, of every file that the diffs add, imported under the name it would have."""
    found: dict[str, Any] = {}
    for diff in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL):
        for path, body in re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)\n((?:\+.*\n)+)", diff, re.MULTILINE):
            name = path.removesuffix(".py").replace("/", ".")
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            code = "\n".join(line[1:] for line in body.splitlines())
            exec(compile(code, path, "exec", dont_inherit=True), module.__dict__)
            found[name] = module
    return found


def test_the_edited_lines_are_there(added: dict[str, Any]) -> None:
    """Lines that a diff shows as context or removed must stand in the file that it edits."""
    root = Path(__file__).parent.parent
    files = [
        part
        for diff in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
        for part in re.split(r"^--- ", diff, flags=re.M)
    ]
    edits = [part.splitlines() for part in files if part.startswith("a/")]
    assert len(edits) == 3 and len(added) == 3
    for old, _, *body in edits:
        lines = (root / old.removeprefix("a/")).read_text(encoding="utf-8").splitlines()
        assert [
            line for line in body if line[:1] in (" ", "-") and line[1:] and line[1:] not in lines
        ] == [], old


def test_the_format_of_the_page_packs_as_modelopt_does(added: dict[str, Any]) -> None:
    from modelopt.torch.quantization.qtensor import MXFP4QTensor
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    from toolchain.codecs import Calibrated

    codec = added["toolchain.codecs.w4a8_mxfp4_fp8"].W4A8Mxfp4Fp8Codec()
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    amax = weight.abs().amax()
    packed = codec.pack(weight, Calibrated(input_amax=amax))
    values, scale = MXFP4QTensor.quantize(weight, 32)
    assert torch.equal(packed["weight"], values._quantized_data)
    assert torch.equal(packed["weight_scale"], scale.view(64, 4))
    torch.testing.assert_close(
        codec.quantize_input(weight, packed), fp8_eager(weight, amax), rtol=4e-7, atol=0
    )
    assert {item.suffix: item.shape(64, 128) for item in codec.format.stored} == {
        suffix: tuple(tensor.shape) for suffix, tensor in packed.items()
    }


def test_the_family_of_the_page_knows_every_part_of_the_real_model(added: dict[str, Any]) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    family = added["toolchain.families.olmoe"].OLMOE
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(num_hidden_layers=1, num_experts=2))
    names = [
        name.replace("experts.gate_up_proj", "experts.0.gate_proj.weight") for name in model.state_dict()
    ]
    roles = {name: family.classify(name).role.value for name in names}
    assert "other" not in roles.values(), roles
    assert roles["model.layers.0.mlp.gate.weight"] == "router"
    assert roles["model.layers.0.mlp.experts.0.gate_proj.weight"] == "routed_expert"
