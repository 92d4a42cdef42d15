"""The bill of materials, against CycloneDX's own schema and the files themselves."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.releases import CALIBRATION, make_release
from toolchain.core.environment import package_versions
from toolchain.core.errors import UsageError
from toolchain.publish.sbom import write_sbom


def validate(text: str) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The document, and its components (nested ones too) by reference."""
    text = path.read_text()
    validate(text)
    document = json.loads(text)
    found: dict[str, dict[str, Any]] = {}

    def visit(component: dict[str, Any]) -> None:
        found[component["bom-ref"]] = component
        for inner in component.get("components", ()):
            visit(inner)

    visit(document["metadata"]["component"])
    for component in document["components"]:
        visit(component)
    return document, found


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {
        item["name"].removeprefix("toolchain:"): item["value"] for item in component.get("properties", ())
    }


def test_it_names_every_file_the_source_and_the_data(tmp_path: Path) -> None:
    engine = make_release(tmp_path)
    document, components = read(write_sbom(engine))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    model = document["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "base-moe-nvfp4")
    assert properties(model)["quant_algo"] == "NVFP4"
    assert model["pedigree"]["ancestors"][0]["group"] == "someone"
    for file in (engine / "checkpoint").iterdir():
        (digest,) = components[f"model/{file.name}"]["hashes"]
        assert (digest["alg"], digest["content"]) == (
            "SHA-256",
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
    source = components["source-model"]
    assert (source["type"], source["name"]) == ("machine-learning-model", "Base-MoE")
    assert source["externalReferences"][0]["url"] == "https://huggingface.co/someone/Base-MoE"
    assert components["source-model/model.safetensors"]["hashes"][0]["content"] == "12" * 32
    calibration = components["calibration-data"]
    assert (calibration["type"], calibration["name"]) == ("data", "calib.jsonl")
    assert calibration["hashes"][0]["content"] == hashlib.sha256(CALIBRATION).hexdigest()
    assert properties(calibration)["samples"] == "64"
    needs = {item["ref"]: item.get("dependsOn", []) for item in document["dependencies"]}
    assert {"source-model", "calibration-data", "python/toolchain"} <= set(needs["model"])


def test_packages_of_this_environment_come_with_what_they_require(tmp_path: Path) -> None:
    """Versions and licences as importlib.metadata tells them."""
    document, components = read(write_sbom(make_release(tmp_path, versions=package_versions())))
    torch = components["python/torch"]
    assert torch["version"] == importlib.metadata.version("torch")
    assert torch["purl"].startswith("pkg:pypi/torch@")
    assert components["python/filelock"]["version"] == importlib.metadata.version("filelock")
    needs = {item["ref"]: item.get("dependsOn", []) for item in document["dependencies"]}
    assert "python/filelock" in needs["python/torch"]
    assert components["python/pyyaml"]["licenses"][0]["license"]["id"] == "MIT"
    assert components["python/click"]["licenses"] == [{"license": {"id": "BSD-3-Clause"}}]
    told = [item for item in components.values() if item.get("purl", "").startswith("pkg:pypi")]
    assert sum("licenses" in item for item in told) > 0.8 * len(told)


def test_packages_of_another_environment_are_those_recorded(tmp_path: Path) -> None:
    _, components = read(write_sbom(make_release(tmp_path)))
    libraries = {item["name"]: item["version"] for item in components.values() if item["type"] == "library"}
    assert libraries == {"toolchain": "0.0.1", "torch": "9.9.9"}
    assert "licenses" not in components["python/torch"], "9.9.9 is not installed: nobody asked it"


def test_the_same_engine_gives_the_same_bytes(tmp_path: Path) -> None:
    first = make_release(tmp_path / "a")
    second = make_release(tmp_path / "b")
    assert write_sbom(first).read_bytes() == write_sbom(first).read_bytes() == write_sbom(second).read_bytes()
    other = make_release(tmp_path / "c", policy="mlp-only")
    numbers = [json.loads(write_sbom(item).read_text())["serialNumber"] for item in (first, other)]
    assert numbers[0] != numbers[1]
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", numbers[0])
    assert json.loads(write_sbom(first).read_text())["metadata"]["timestamp"].startswith(
        "2026-11-20T10:00:00"
    )


def test_several_texts_have_one_hash_of_no_file(tmp_path: Path) -> None:
    engine = make_release(tmp_path)
    quantized = engine / "checkpoint" / "quantize.json"
    value = json.loads(quantized.read_text())
    value["calibration"]["source"] = ["/home/somebody/a.jsonl", "owner/texts"]
    quantized.write_text(json.dumps(value))
    _, components = read(write_sbom(engine))
    found = components["calibration-data"]
    assert found["name"] == "a.jsonl, owner/texts"
    assert "hashes" not in found
    assert properties(found)["content_sha256"] == hashlib.sha256(CALIBRATION).hexdigest()


def test_nothing_says_where_files_lay(tmp_path: Path) -> None:
    for model in ("someone/Base-MoE", "/home/somebody/base"):
        path = write_sbom(make_release(tmp_path / Path(model).name, model=model))
        assert "somebody" not in path.read_text()
        validate(path.read_text())


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", {"id": "Apache-2.0"}),
        ("license: other\nlicense_name: base-community\nlicense_link: LICENSE", {"name": "base-community"}),
    ],
)
def test_the_licence_is_that_of_the_source(tmp_path: Path, front: str, expected: dict[str, str]) -> None:
    source = tmp_path / "base"
    source.mkdir()
    (source / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    _, components = read(write_sbom(make_release(tmp_path, model=str(source))))
    for reference in ("model", "source-model"):
        (found,) = components[reference]["licenses"]
        assert expected.items() <= found["license"].items()


def test_a_real_engine(made: Any, tmp_path: Path) -> None:
    copy = made.copy_to(tmp_path)
    _, components = read(write_sbom(copy.engine))
    assert "model/model.safetensors" in components
    assert "python/nvidia-modelopt" in components


def test_an_unfinished_engine_has_none(tmp_path: Path) -> None:
    engine = make_release(tmp_path)
    (engine / "engine.json").unlink()
    with pytest.raises(UsageError, match=r"holds no engine\.json") as caught:
        write_sbom(engine)
    assert caught.value.code == "TC-901"
    assert not (engine / "sbom.cdx.json").exists()
