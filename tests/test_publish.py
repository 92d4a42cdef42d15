"""Publishing through the real command and the real huggingface_hub client, against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.hub_upload import COMMIT, TOKEN, Hub, hub_upload
from tests.releases import METRICS, make_release
from toolchain.core.errors import UsageError
from toolchain.publish.card import render_card
from toolchain.publish.parts import ranges
from toolchain.publish.release import read_release

REPO = "me/base-moe-nvfp4"


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Push = Callable[..., Done]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_upload() as found:
        yield found


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Push:
    """``toolchain push ...`` in a process whose hub is ours and who is logged in there."""

    def run(*arguments: object, **settings: str) -> Done:
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        env |= {
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        env.pop("HF_HUB_OFFLINE", None)
        env |= settings
        script = "from toolchain.cli.main import main; main()"
        command = [sys.executable, "-c", script, "push", *map(str, arguments)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert TOKEN not in done.stdout + done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def card_of(text: str) -> tuple[dict[str, Any], str]:
    card = ModelCard(text)
    return card.data.to_dict(), card.text


# --- upload -----------------------------------------------------------------------------------------------------------


def test_the_checkpoint_its_card_and_its_sbom_arrive(push: Push, hub: Hub, tmp_path: Path) -> None:
    engine = make_release(tmp_path, target="trtllm")
    done = push(engine, REPO, "--private", "--message", "First", "--json")
    assert done.status == 0, done.err
    assert done.json["commit"] == COMMIT
    files = hub.branches["main"]
    for source in (engine / "checkpoint").iterdir():
        assert files[source.name] == source.read_bytes()
    assert files["llm_args.yaml"] == (engine / "llm_args.yaml").read_bytes()
    assert json.loads(files["sbom.cdx.json"])["bomFormat"] == "CycloneDX"
    assert files["README.md"].decode() == done.json["card"]
    assert set(files) == {item["path"] for item in done.json["files"]}
    assert (hub.repositories, hub.messages) == ({REPO: True}, ["First"])


def test_a_second_upload_sends_no_weight_again_and_removes_old_ones(
    push: Push, hub: Hub, tmp_path: Path
) -> None:
    engine = make_release(tmp_path)
    hub.branches["main"] = {"model-00003-of-00003.safetensors": b"old", "notes.txt": b"mine"}
    first = push(engine, REPO, "--json")
    assert first.json["deleted"] == ["model-00003-of-00003.safetensors"]
    assert hub.branches["main"]["notes.txt"] == b"mine"
    assert push(engine, REPO).status == 0
    sent = [line for line in hub.log if line.startswith("PUT storage/")]
    assert len(sent) == 2, "two shards, once each"


def test_another_branch(push: Push, hub: Hub, tmp_path: Path) -> None:
    assert push(make_release(tmp_path), REPO, "--revision", "v2").status == 0
    assert hub.repositories == {REPO: False}
    assert "model-00001-of-00002.safetensors" in hub.branches["v2"]
    assert hub.branches["main"] == {}


def test_a_transfer_that_breaks_off_is_repeated(push: Push, hub: Hub, tmp_path: Path) -> None:
    hub.failing_uploads = 2
    done = push(make_release(tmp_path), REPO)
    assert done.status == 0, done.err
    assert len(hub.objects) == 2


def test_what_arrives_runs_and_builds_as_the_card_says(
    push: Push, hub: Hub, made: Any, toolchain: Callable[..., Any], tmp_path: Path
) -> None:
    from toolchain.runtime.engine import LocalEngine
    from toolchain.runtime.types import SamplingParams

    engine = made.copy_to(tmp_path / "made").engine
    assert push(engine, REPO).status == 0
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in hub.branches["main"].items():
        (fetched / name).write_bytes(content)
    answers = []
    for directory in (engine, fetched):
        with LocalEngine.load(directory, device="cpu") as runtime:
            answers.append(runtime.generate("def f", SamplingParams(max_tokens=8)).token_ids)
    assert answers[0] == answers[1]
    built = toolchain("build", fetched, "--output", tmp_path / "built", "--json")
    assert built.status == 0, built.err
    assert (
        built.json["files"]["checkpoint/model.safetensors"]
        == hashlib.sha256((engine / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()
    )


# --- dry run ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_every_file_and_asks_no_network(push: Push, hub: Hub, tmp_path: Path) -> None:
    engine = make_release(tmp_path)
    before = {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()}
    done = push(engine, REPO, "--dry-run", "--json", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.status == 0, done.err
    listed = {item["path"]: item["bytes"] for item in done.json["files"]}
    for source in (engine / "checkpoint").iterdir():
        assert listed[source.name] == source.stat().st_size
    assert {"README.md", "sbom.cdx.json"} < set(listed)
    assert done.json["bytes"] == sum(listed.values())
    assert card_of(done.json["card"])[0]["base_model"] == "someone/Base-MoE"
    assert hub.log == []
    assert {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()} == before
    text = push(engine, REPO, "--dry-run", HF_HUB_OFFLINE="1")
    assert "model-00002-of-00002.safetensors" in text.out
    assert "## What was quantized" in text.out


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_failed_a_gate_is_not_published(push: Push, hub: Hub, tmp_path: Path) -> None:
    gates = [{"gate": "max_kl", "limit": 0.01, "value": 0.0125, "passed": False}]
    engine = make_release(tmp_path, metrics={**METRICS, "fit": False, "gates": gates})
    refused = push(engine, REPO, "--json")
    assert (refused.status, refused.json["error"]["code"]) == (1, "TC-902")
    assert "failed a gate" in refused.json["error"]["findings"][0]["message"]
    assert push(engine, REPO, "--dry-run").status == 1
    assert hub.log == []
    forced = push(engine, REPO, "--force")
    assert forced.status == 0, forced.err
    card = hub.branches["main"]["README.md"].decode()
    assert "should not be used as it is" in card
    assert "| max_kl | 0.01 | 0.0125 | **no** |" in card


def test_changed_missing_and_added_files_are_found(push: Push, hub: Hub, tmp_path: Path) -> None:
    engine = make_release(tmp_path)
    shard = engine / "checkpoint" / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (engine / "checkpoint" / "tokenizer.json").unlink()
    (engine / "checkpoint" / "model-00009.safetensors").write_bytes(b"?")
    found = push(engine, REPO, "--json").json["error"]["findings"]
    where = " ".join(item["where"] for item in found)
    for name in ("model-00001-of-00002.safetensors", "tokenizer.json", "model-00009.safetensors"):
        assert name in where
    assert hub.log == []


@pytest.mark.parametrize("verdict", ["absent", "failed"])
def test_what_was_not_audited_is_not_published(push: Push, tmp_path: Path, verdict: str) -> None:
    engine = make_release(tmp_path, passed=False)
    if verdict == "absent":
        (engine / "verify.json").unlink()
    refused = push(engine, REPO)
    assert refused.status == 1
    assert "audit" in refused.err


def test_what_is_no_engine_or_no_name(push: Push, tmp_path: Path) -> None:
    engine = make_release(tmp_path)
    for name in ("nobody", "a/b/c", "me/with space", "me/-x"):
        refused = push(engine, name, "--dry-run", "--json")
        assert (refused.status, refused.json["error"]["code"]) == (2, "TC-906"), name
    (engine / "engine.json").unlink()
    refused = push(engine, REPO, "--json")
    assert (refused.status, refused.json["error"]["code"]) == (2, "TC-901")


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("api/repos/create", 401, "hf auth login"),
        ("api/repos/create", 403, "may not write"),
        ("api/models", 404, "no such owner, repository or revision"),
        ("api/models", 409, "somebody else"),
    ],
)
def test_what_the_hub_refuses(
    push: Push, hub: Hub, tmp_path: Path, path: str, status: int, said: str
) -> None:
    hub.answers[path] = status
    refused = push(make_release(tmp_path), REPO, "--json")
    error = refused.json["error"]
    assert (refused.status, error["code"]) == (1, "TC-904")
    assert f"HTTP {status}" in error["message"]
    assert said in error["message"] + error["hint"]


def test_without_a_login_and_without_a_network(push: Push, hub: Hub, tmp_path: Path) -> None:
    engine = make_release(tmp_path)
    nobody = push(engine, REPO, "--json", HF_TOKEN="")
    assert (nobody.json["error"]["code"], "HTTP 401" in nobody.json["error"]["message"]) == ("TC-904", True)
    for settings in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        away = push(engine, REPO, "--json", **settings)
        assert (away.status, away.json["error"]["code"]) == (1, "TC-905"), away.out
        assert "HF_HUB_OFFLINE" in away.json["error"]["hint"]


# --- card -------------------------------------------------------------------------------------------------------------


def rendered(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], str]:
    return card_of(render_card(read_release(make_release(tmp_path, **options)), REPO))


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    source = tmp_path / "base"
    source.mkdir()
    head = {"license": "other", "license_name": "base-community", "license_link": "https://x.test/LICENSE"}
    head |= {"language": ["en", "de"], "pipeline_tag": "image-text-to-text", "base_model": "not/ours"}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n# Base\n")
    data, text = rendered(tmp_path, model=str(source))
    for key in ("license", "license_name", "license_link", "language", "pipeline_tag"):
        assert data[key] == head[key]
    assert "base_model" not in data, "a directory has no name on the hub"
    assert "base-community" in text
    stated = read_release(tmp_path / "base-moe-nvfp4", base_model="someone/Base-MoE", license_id="mit")
    data, _ = card_of(render_card(stated, REPO))
    assert (data["base_model"], data["base_model_relation"]) == ("someone/Base-MoE", "quantized")
    assert (data["license"], data.get("license_name")) == ("mit", None)
    assert {"quantized", "modelopt", "nvfp4", "moe"} <= set(data["tags"])


def test_the_card_has_the_measured_numbers(tmp_path: Path) -> None:
    _, text = rendered(tmp_path)
    assert "| perplexity | 8.1250 | 7.9000 to 8.4000 |" in text
    assert "| KL(source, quantized), mean, nats per token | 0.012500 | 0.011000 to 0.015000 |" in text
    assert "| same experts chosen | 97.500% | - |" in text
    assert "4096 tokens in windows of 512 every 512" in text
    assert "| max_kl | 0.02 | 0.0125 | yes |" in text
    assert "calib.jsonl, 64 samples of 512 tokens, seed 3" in text
    assert "/home/somebody" not in text
    assert "mse+gptq" in text
    assert "| routed experts | nvfp4 (NVFP4) | 1-2 | 75.0% |" in text
    assert "| routed experts | source dtype | 0 | 6.2% |" in text
    assert "**not measured**" in text, "tasks"


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    _, text = rendered(tmp_path, metrics=None)
    assert "agreement with the source model: **not measured**" in text
    assert "## Speed\n\nNot measured." in text
    assert "| perplexity |" not in text


def test_benchmarks_and_tasks_of_the_engine(tmp_path: Path, made: Any) -> None:
    from toolchain.evaluate.harness.kept import keep_tasks

    engine = make_release(tmp_path)
    spread = {"p50": 12.25, "p90": 20.0, "p99": 30.0, "mean": 13.0, "count": 4}
    level = {
        "concurrency": 4,
        "errors": 0,
        "ttft_ms": spread,
        "tpot_ms": spread,
        "output_tokens_per_s": 81.63,
    }
    environment = {"cpu": "Some CPU", "gpus": [], "server": {"name": "triton", "version": "2.51.0"}}
    result = {"environment": environment, "settings": {"prompt_tokens": 64, "output_tokens": 32}}
    (engine / "bench").mkdir()
    (engine / "bench" / "1.json").write_text(json.dumps({**result, "levels": [level]}))
    accuracy = {"value": 0.62, "stderr": 0.0134, "higher_is_better": True}
    task = {"metrics": {"acc": accuracy}, "num_fewshot": 5, "samples": 100, "documents": 1319}
    document = {"harness": {}, "settings": {}, "results": {"gsm8k": task}, "groups": {}, "commands": []}
    assert keep_tasks(engine, document)
    text = render_card(read_release(engine), REPO)
    assert "| 4 | 12.2 | 12.25 | 81.6 | 0 |" in text
    assert "| gsm8k | acc | 0.6200 | 0.0134 | 5 | 100 of 1319 |" in text
    manifest = json.loads((engine / "engine.json").read_text())
    manifest["files"]["checkpoint/config.json"] = "0" * 64
    (engine / "engine.json").write_text(json.dumps(manifest))
    assert "gsm8k" not in render_card(read_release(engine), REPO), "those were other bytes"


@pytest.mark.parametrize(
    ("algo", "formats", "method"),
    [
        ("NVFP4", ("nvfp4",), "modelopt_fp4"),
        ("W4A16_NVFP4", ("w4a16_nvfp4",), "modelopt_fp4"),
        ("FP8", ("fp8",), "modelopt"),
        ("MXFP8", ("mxfp8",), "modelopt_mxfp8"),
        ("MIXED_PRECISION", ("nvfp4", "fp8"), "modelopt_mixed"),
        ("MIXED_PRECISION", ("nvfp4", "int4_awq"), None),
        ("FP8_PER_CHANNEL_PER_TOKEN", ("fp8_per_channel_per_token",), None),
        ("W4A16_AWQ", ("int4_awq",), None),
        ("FP8_BLOCK_SCALES", ("fp8_block",), None),
        ("W4A16_MXFP4", ("mxfp4",), None),
    ],
)
def test_vllm_is_named_where_it_reads_the_checkpoint(
    tmp_path: Path, algo: str, formats: tuple[str, ...], method: str | None
) -> None:
    _, text = rendered(tmp_path, quant_algo=algo, formats=formats)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("vllm serve")]
    if method is None:
        assert commands == []
        return
    (words,) = commands
    assert words[:3] == ["vllm", "serve", REPO]
    assert words[words.index("--quantization") + 1] == method
    assert words[words.index("--kv-cache-dtype") + 1] == "fp8"


def test_tensorrt_llm_gets_the_arguments_of_the_engine(tmp_path: Path) -> None:
    _, text = rendered(tmp_path, target="trtllm")
    assert "--extra_llm_api_options base-moe-nvfp4/llm_args.yaml" in text
    assert "TensorRT-LLM 1.2.1 on b200" in text
    _, local = rendered(tmp_path / "local")
    assert "llm_args.yaml" not in local
    assert "--tp_size 2" in local


def test_the_card_of_a_real_engine(made: Any, tmp_path: Path) -> None:
    copy = made.copy_to(tmp_path)
    data, text = card_of(render_card(read_release(copy.engine), REPO))
    metrics = json.loads((copy.engine / "metrics.json").read_text())
    assert f"{metrics['ppl']:.4f}" in text
    assert "undefined" not in text.lower()
    assert data["pipeline_tag"] == "text-generation"
    shard = copy.engine / "checkpoint" / "model.safetensors"
    assert (
        hashlib.sha256(shard.read_bytes()).hexdigest()
        == json.loads((copy.engine / "engine.json").read_text())["files"]["checkpoint/model.safetensors"]
    )


def test_ranges_of_layers() -> None:
    assert ranges({0, 1, 2, 5, 7, 8}) == "0-2, 5, 7-8"
    assert ranges(set()) == ""


def test_no_engine_no_release(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        read_release(tmp_path / "absent")
