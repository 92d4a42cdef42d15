"""Kubernetes manifests: against the published schemas, against what the plan says, and frozen as goldens."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deployments import write_engine
from toolchain.build.llmapi.commands import unrecorded_options
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.deploy.settings import DeploySettings
from toolchain.deploy.write import deploy_engine, prepare
from toolchain.targets import TRTLLM

GOLDENS = Path(__file__).parent / "golden" / "deploy"
KUBERNETES = kubernetes_validate.latest_version()
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local": ({"target": "local", "gpu": "cpu"}, {"image": "registry.example/toolchain-local:0.1.0"}),
    "trtllm-serve": ({"tp": 4, "ep": 4}, {"node_selector": (("nvidia.com/gpu.product", "NVIDIA-B200"),)}),
    "triton": ({"tp": 2, "version": "1.1.0"}, {"runtime": "triton"}),
    "tensorrt": ({"target": "tensorrt", "tp": 2, "version": "1.1.0"}, {}),
    "vllm": ({"tp": 2, "ep": 2}, {"runtime": "vllm", "replicas": 2}),
    "sglang": ({"tp": 2, "ep": 2}, {"runtime": "sglang"}),
    "vllm-nodes": ({"tp": 8, "pp": 2}, {"runtime": "vllm"}),
    "sglang-nodes": ({"tp": 16, "ep": 16}, {"runtime": "sglang"}),
    "trtllm-nodes": ({"tp": 16, "ep": 16}, {}),
}
"""Name -> (engine, settings)."""
SET_FIELDS = {
    "replicas", "startupPolicy", "leaderWorkerTemplate", "rolloutStrategy", "networkConfig",
}  # fmt: skip
TEMPLATE_FIELDS = {
    "leaderTemplate", "workerTemplate", "size", "restartPolicy", "subGroupPolicy", "volumeClaimTemplates",
    "persistentVolumeClaimRetentionPolicy",
}  # fmt: skip
RESTART = {"Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"}
"""Fields and values of LeaderWorkerSet: its API types (leaderworkerset.x-k8s.io/v1) at commit 024af08."""


def rendered(case: str, root: Path) -> tuple[str, list[dict[str, Any]]]:
    """(text, documents) of one case."""
    engine, settings = CASES[case]
    deploy_engine(write_engine(root / "Some_Engine.v1", **engine), root / "out", DeploySettings(**settings))
    text = (root / "out" / "manifests.yaml").read_text()
    return text, list(yaml.safe_load_all(text))


def pods(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in documents:
        if item["kind"] == "Deployment":
            yield item["spec"]["template"]
        if item["kind"] == "LeaderWorkerSet":
            template = item["spec"]["leaderWorkerTemplate"]
            yield template["leaderTemplate"]
            yield template["workerTemplate"]


@pytest.mark.parametrize("case", CASES)
def test_golden_manifests(case: str, tmp_path: Path) -> None:
    text, _ = rendered(case, tmp_path)
    commands = (tmp_path / "out" / "commands.json").read_text()
    for path, found in ((GOLDENS / f"{case}.yaml", text), (GOLDENS / f"{case}.json", commands)):
        if os.environ.get("WRITE_GOLDENS"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(found)
        assert found == path.read_text(), f"{path.name} changed: `make goldens` if that is wanted"


@pytest.mark.parametrize("case", CASES)
def test_objects_are_valid_kubernetes(case: str, tmp_path: Path) -> None:
    """Strict: unknown fields are errors. The templates inside a LeaderWorkerSet are checked as pods."""
    _, documents = rendered(case, tmp_path)
    for item in documents:
        if item["kind"] != "LeaderWorkerSet":
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
            continue
        assert item["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
        assert set(item["spec"]) <= SET_FIELDS
        assert item["spec"]["startupPolicy"] in {"LeaderCreated", "LeaderReady"}
        template = item["spec"]["leaderWorkerTemplate"]
        assert set(template) <= TEMPLATE_FIELDS and template["restartPolicy"] in RESTART
        for pod in pods([item]):
            whole = {
                "apiVersion": "v1",
                "kind": "Pod",
                **pod,
                "metadata": {"name": "pod", **pod["metadata"]},
            }
            kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_modest(case: str, tmp_path: Path) -> None:
    """Not root, nothing added, models read-only, images by tag or digest, and only what answers has probes."""
    _, documents = rendered(case, tmp_path)
    for index, pod in enumerate(pods(documents)):
        spec = pod["spec"]
        (server,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert server["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False
        models = [mount for mount in server["volumeMounts"] if mount["name"] == "models"]
        assert models and all(mount["readOnly"] for mount in models)
        assert re.search(r":[^/]+$", server["image"]) and ":latest" not in server["image"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(server) or index == 1
        mounted = {mount["name"] for mount in server["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize(
    ("tp", "pp", "per_node", "nodes", "each"),
    [
        (8, 1, 8, 1, 8),
        (4, 2, 8, 1, 8),
        (8, 2, 8, 2, 8),
        (16, 1, 4, 4, 4),
        (4, 3, 8, 2, 6),
    ],
)
def test_gpus_are_those_of_the_plan(
    tp: int, pp: int, per_node: int, nodes: int, each: int, tmp_path: Path
) -> None:
    engine = write_engine(tmp_path / "e", tp=tp, pp=pp)
    deploy_engine(engine, tmp_path / "out", DeploySettings(runtime="vllm", gpus_per_node=per_node))
    documents = list(yaml.safe_load_all((tmp_path / "out" / "manifests.yaml").read_text()))
    assert documents[-1]["kind"] == ("Deployment" if nodes == 1 else "LeaderWorkerSet")
    if nodes > 1:
        assert documents[-1]["spec"]["leaderWorkerTemplate"]["size"] == nodes
    for pod in pods(documents):
        resources = pod["spec"]["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == str(each)


@pytest.mark.parametrize("case", CASES)
def test_entry_points_of_nvidias_images_stay(case: str, tmp_path: Path) -> None:
    """vLLM's image has a server for entry point, ours the toolchain: there the command takes its place."""
    _, documents = rendered(case, tmp_path)
    for pod in pods(documents):
        (server,) = pod["spec"]["containers"]
        assert ("args" in server) == server["image"].startswith("nvcr.io/nvidia/")
        assert ("args" in server) != ("command" in server)


def test_host_memory_holds_a_nodes_share_of_the_weights(tmp_path: Path) -> None:
    """3 GiB and a byte over two nodes: 2 GiB each, beside the 16 that everything else may take."""
    engine = write_engine(tmp_path / "e", tp=16, shard_bytes=3 * 2**30 + 1)
    deploy_engine(engine, tmp_path / "out", DeploySettings(runtime="vllm"))
    for pod in pods(list(yaml.safe_load_all((tmp_path / "out" / "manifests.yaml").read_text()))):
        assert pod["spec"]["containers"][0]["resources"]["requests"]["memory"] == "18Gi"


@pytest.mark.parametrize("case", CASES)
def test_the_service_reaches_exactly_the_pods_that_answer(case: str, tmp_path: Path) -> None:
    _, documents = rendered(case, tmp_path)
    service = next(item for item in documents if item["kind"] == "Service")
    # A LeaderWorkerSet makes a headless Service of its own name; another one there would take its pods their names.
    sets = [item["metadata"]["name"] for item in documents if item["kind"] == "LeaderWorkerSet"]
    assert service["metadata"]["name"] not in sets
    for pod in pods(documents):
        labels, (server,) = pod["metadata"]["labels"], pod["spec"]["containers"]
        reached = service["spec"]["selector"].items() <= labels.items()
        assert reached == ("readinessProbe" in server)
        if reached:
            names = {port["name"] for port in server["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} == names


def test_the_probes_script_is_the_one_in_the_config_map(tmp_path: Path) -> None:
    _, documents = rendered("trtllm-nodes", tmp_path)
    scripts = next(item for item in documents if item["kind"] == "ConfigMap")["data"]
    leader = next(pods(documents))["spec"]["containers"][0]
    mount = next(item["mountPath"] for item in leader["volumeMounts"] if item["name"] == "scripts")
    used = {leader["args"][1], *(leader[name]["exec"]["command"][1] for name in leader if "Probe" in name)}
    assert used == {f"{mount}/{name}" for name in scripts}
    compile(scripts["health.py"], "health.py", "exec")


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        ({}, {"runtime": "triton"}, "no published Triton image is known to carry TensorRT-LLM 1.2.1"),
        ({"target": "tensorrt", "version": "1.2.1"}, {}, "no published Triton image"),
        (
            {"target": "tensorrt", "version": "1.1.0"},
            {"runtime": "vllm"},
            "does not serve engines of target tensorrt",
        ),
        ({"tp": 13}, {}, "= 13 GPUs do not spread evenly over 2 nodes of 8"),
        (
            {"tp": 4, "pp": 3, "version": "1.1.0"},
            {"runtime": "triton"},
            "Triton serves an engine of one node",
        ),
        (
            {"formats": ("int4_awq",), "quant_algo": "W4A16_AWQ"},
            {"runtime": "vllm"},
            "does not know W4A16_AWQ",
        ),
        ({"target": "local", "gpu": "cpu"}, {"runtime": "vllm"}, "planned for the local runtime"),
        (
            {"target": "local", "gpu": "cpu"},
            {"runtime": "trtllm-serve"},
            "does not serve engines of target local",
        ),
        ({}, {"name": "No_Name"}, "no name of a Kubernetes Service"),
        ({}, {"gpus_per_node": 0}, "expected 1 or more"),
        ({}, {"replicas": -1}, "expected 0 or more"),
    ],
)
def test_what_cannot_be_served_is_refused_without_output(
    engine: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        deploy_engine(write_engine(tmp_path / "e", **engine), tmp_path / "out", DeploySettings(**settings))
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_tensorrt_engine_that_is_not_built_is_not_deployed(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", target="tensorrt", tp=2, version="1.1.0")
    (engine / "engine" / "rank1.engine").unlink()
    with pytest.raises(ToolchainError, match=r"lacks rank1\.engine"):
        deploy_engine(engine, tmp_path / "out", DeploySettings())


def test_an_engine_without_its_arguments_is_not_deployed(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e")
    (engine / "llm_args.yaml").unlink()
    with pytest.raises(UsageError, match=r"llm_args\.yaml is missing"):
        prepare(engine, DeploySettings())


@pytest.mark.parametrize("version", TRTLLM.versions)
def test_options_of_trtllm_serve_are_recorded_for_the_release(version: str, tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", version=version)
    words = prepare(engine, DeploySettings()).server.leader
    assert unrecorded_options(words, version) == []


def test_command_line(toolchain: Callable[..., Any], tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e", tp=2)
    ran = toolchain("deploy", engine, "--output", tmp_path / "out", "--json")
    assert (ran.status, ran.json["kinds"]) == (0, ["ConfigMap", "Service", "Deployment"])
    commands = {item["runtime"]: item for item in ran.json["commands"]}
    assert commands["vllm"]["command"][:3] == ["vllm", "serve", "/engine/checkpoint"]
    assert (tmp_path / "out" / "commands.json").is_file()
    dry = toolchain("deploy", engine, "--output", tmp_path / "dry", "--dry-run")
    assert dry.status == 0 and not (tmp_path / "dry").exists()
    assert toolchain("deploy", engine, "--output", tmp_path / "out").status == 2
    assert toolchain("deploy", engine, "--output", tmp_path / "out", "--force").status == 0
    assert toolchain("deploy", engine, "--node-selector", "x", "--dry-run").status == 2
    assert toolchain("deploy", tmp_path, "--dry-run").status == 2


def test_files_that_a_pod_cannot_read_are_named(toolchain: Callable[..., Any], tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e")
    (engine / "checkpoint" / "model.safetensors").chmod(0o600)
    ran = toolchain("deploy", engine, "--dry-run")
    assert ran.status == 0 and "TC-465" in ran.err and "model.safetensors" in ran.err
