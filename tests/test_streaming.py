"""Quantization without data, streamed: the same files as in memory, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import streamed
from tests.planning import plan_for
from tests.streamed import files, hidden
from tests.tiny import make_fp8_source, make_mxfp4_source
from toolchain.checkpoint.audit import audit
from toolchain.checkpoint.shard_file import ShardFile, TensorSpec
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.plan.policy import PolicyOptions
from toolchain.plan.types import Plan
from toolchain.quantize.job import quantize
from toolchain.quantize.streaming.datafree import quantize_stream
from toolchain.quantize.streaming.rows import TORCH_DTYPES

Tiny = Callable[[str], Path]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed.small_shards(monkeypatch)


def stream(plan: Plan, output: Path, **options: Any) -> dict[str, Any]:
    return quantize_stream(plan, output, device="cpu", **options)


def test_a_file_filled_out_of_order_is_what_the_library_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{dtype}": torch.randint(0, 100, (5, 3), generator=generator).to(TORCH_DTYPES[dtype])
        for dtype in TORCH_DTYPES
        for name in ("z", "a", "ü")
    }
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "library", {"format": "pt"})
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = [TensorSpec(name=k, dtype=names[v.dtype], shape=tuple(v.shape)) for k, v in tensors.items()]
    file = ShardFile(tmp_path / "ours", specs)
    for name in reversed(list(tensors)):
        tensor = tensors[name]
        if tensor.dim() and len(tensor):
            file.put(name, tensor[2:], at=2)
            file.put(name, tensor[:2], at=0)
        else:
            file.put(name, tensor)
    file.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


CASES = [
    ("qwen3_moe", "w4a16_nvfp4", {}),
    ("qwen3_moe", "w4a16_nvfp4", {"recipe": "window"}),
    ("qwen3_moe", "w4a16_nvfp4", {"recipe": "four_over_six", "policy": "all-linear"}),
    ("qwen3_moe", "nvfp4", {"recipe": "pinned", "kv_cache": "fp8_cast"}),
    (
        "deepseek_v3",
        "nvfp4",
        {"recipe": "mse+pinned", "policy_options": PolicyOptions(shared_experts="bf16")},
    ),
    ("mixtral", "mxfp4", {}),
    ("mixtral", "mxfp8", {}),
    ("glm4_moe", "fp8_block", {}),
    ("llama", "fp8_per_channel_per_token", {}),
    ("llama", "int8_wo", {}),
    ("gpt_oss", "w4a16_nvfp4", {}),
    ("gpt_oss", "mxfp4", {}),
    ("llama4_text", "nvfp4", {"recipe": "pinned", "policy_options": PolicyOptions(shared_experts="bf16")}),
]


@pytest.mark.parametrize(("kind", "format", "options"), CASES)
def test_the_same_files_as_in_memory(
    kind: str, format: str, options: dict[str, Any], tiny: Tiny, tmp_path: Path, small_shards: None
) -> None:
    plan = plan_for(tiny(kind), format, **options)
    quantize(plan, tmp_path / "memory", device="cpu")
    manifest = stream(plan, tmp_path / "stream")
    expected = files(tmp_path / "memory")
    assert files(tmp_path / "stream") == expected
    assert len([name for name in expected if name.endswith(".safetensors")]) > 3
    assert hidden(tmp_path) == [] and audit(tmp_path / "stream", against=tiny(kind)).passed
    assert manifest == json.loads((tmp_path / "stream" / "quantize.json").read_text())


@pytest.mark.parametrize(
    ("format", "options"),
    [("nvfp4", {}), ("nvfp4", {"recipe": "pinned", "kv_cache": "fp8"}), ("int4_awq", {"recipe": "max"})],
)
def test_a_plan_that_needs_data_is_refused(
    format: str, options: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    plan = plan_for(tiny("qwen3_moe"), format, **options)
    with pytest.raises(UsageError, match="cannot be streamed without data") as refused:
        stream(plan, tmp_path / "out")
    assert refused.value.code == "TC-232" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["fp8_block", "w4a16_nvfp4", "mxfp4"])
def test_an_fp8_source(format: str, tiny: Tiny, tmp_path: Path, small_shards: None) -> None:
    source = make_fp8_source(tiny("deepseek_v3"), tmp_path / "source")
    plan = plan_for(source, format, policy_options=PolicyOptions(shared_experts="bf16"))
    made = quantize(plan, tmp_path / "memory", device="cpu")
    manifest = stream(plan, tmp_path / "stream")
    assert files(tmp_path / "stream") == files(tmp_path / "memory")
    assert manifest.get("source_numbers") == made.get("source_numbers")


@pytest.mark.parametrize(("format", "recipe"), [("mxfp4", None), ("w4a16_nvfp4", None), ("nvfp4", "pinned")])
def test_an_mxfp4_source(
    format: str, recipe: str | None, tiny: Tiny, tmp_path: Path, small_shards: None
) -> None:
    source = make_mxfp4_source(tiny("gpt_oss"), tmp_path / "source")
    plan = plan_for(source, format, recipe=recipe)
    made = quantize(plan, tmp_path / "memory", device="cpu")
    manifest = stream(plan, tmp_path / "stream")
    assert files(tmp_path / "stream") == files(tmp_path / "memory")
    cast = manifest["source_numbers"]["cast"]
    assert cast == made["source_numbers"]["cast"]


def test_tensors_larger_than_a_part(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read and packed 128 at a time here; nothing depends on it."""
    from toolchain.quantize.streaming import pack

    plan = plan_for(tiny("qwen3_moe"), "nvfp4", recipe="window+pinned", policy="all-linear")
    stream(plan, tmp_path / "whole")
    monkeypatch.setattr(pack, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(pack, "COPY_BYTES", 100)
    stream(plan, tmp_path / "parts", threads=1)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


class Killed(BaseException):
    """What a signal would do, at an instant of the test's choosing."""


def stop_after(monkeypatch: pytest.MonkeyPatch, items: int, error: BaseException) -> None:
    """The packer fails at item number ``items``."""
    from toolchain.quantize.streaming.pack import Packer

    write, count = Packer.write, iter(range(10**9))

    def failing(self: Packer, item: Any, file: Any) -> None:
        if next(count) == items:
            raise error
        write(self, item, file)

    monkeypatch.setattr(Packer, "write", failing)


@pytest.mark.parametrize("items", [0, 7, 20, 40])
def test_a_run_that_ended_goes_on(
    items: int, tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "w4a16_nvfp4")
    stream(plan, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, items, Killed())
        with pytest.raises(Killed):
            stream(plan, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    content = tmp_path / ".out.streaming" / "content"
    kept = {path.name: path.stat().st_ino for path in content.iterdir()}
    stream(plan, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    again = {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert kept.items() <= again.items(), "finished shards are not written again"
    assert bool(kept) == (items > 0) and hidden(tmp_path) == []


def begun(plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch, items: int = 30) -> Path:
    """A run that ended in the middle; returns where its shards are."""
    with monkeypatch.context() as patch:
        stop_after(patch, items, Killed())
        with pytest.raises(Killed):
            stream(plan, output, threads=1)
    return output.parent / f".{output.name}.streaming" / "content"


def test_a_changed_setting_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = begun(plan_for(tiny("qwen3_moe"), "w4a16_nvfp4"), tmp_path / "out", monkeypatch)
    before = {path.name for path in content.iterdir()}
    assert before
    other = plan_for(tiny("qwen3_moe"), "w4a16_nvfp4", recipe="window")
    with pytest.raises(UsageError, match="recipe: 'max' -> 'window'") as refused:
        stream(other, tmp_path / "out")
    assert refused.value.code == "TC-231" and {path.name for path in content.iterdir()} == before
    stream(other, tmp_path / "out", force=True)
    stream(other, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_changed_weights_under_the_same_names_are_noticed(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(tiny("qwen3_moe"), tmp_path / "source")
    plan = plan_for(source, "w4a16_nvfp4")
    begun(plan, tmp_path / "out", monkeypatch)
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, source / "model.safetensors")
    with pytest.raises(UsageError, match="source files"):
        stream(plan, tmp_path / "out")


def test_a_finished_shard_is_trusted_only_by_its_hash(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "w4a16_nvfp4")
    stream(plan, tmp_path / "whole")
    content = begun(plan, tmp_path / "out", monkeypatch)
    victim = sorted(content.iterdir())[0]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    stream(plan, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_full_disk_leaves_what_is_finished(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "w4a16_nvfp4")
    real, count = os.pwrite, iter(range(10**9))

    def full(descriptor: int, data: Any, position: int) -> int:
        if next(count) > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ToolchainError, match="No space left on device") as failed:
            stream(plan, tmp_path / "out", threads=1)
    assert failed.value.code == "TC-005" and "run the same command again" in failed.value.hint
    assert any((tmp_path / ".out.streaming" / "content").iterdir()) and not (tmp_path / "out").exists()
    stream(plan, tmp_path / "out")
    stream(plan, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_failure_names_the_tensor_and_keeps_the_rest(
    tiny: Tiny, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tiny("qwen3_moe"), "w4a16_nvfp4")
    from toolchain.quantize.streaming.pack import Packer

    real = Packer._numbers

    def failing(self: Packer, weight: torch.Tensor, *rest: Any) -> Any:
        if next(count) == 12:
            raise ToolchainError("something is off", code="TC-202")
        return real(self, weight, *rest)

    count = iter(range(10**9))
    monkeypatch.setattr(Packer, "_numbers", failing)
    with pytest.raises(ToolchainError, match=r"model\.layers\.\d+\..*weight: something is off"):
        stream(plan, tmp_path / "out", threads=1)
    assert any((tmp_path / ".out.streaming" / "content").iterdir())


def test_killed_at_any_instant(tiny: Tiny, tmp_path: Path, small_shards: None) -> None:
    plan = plan_for(tiny("qwen3_moe"), "nvfp4", recipe="window+pinned")
    streamed.require_same_after_kills(quantize_stream, plan, tmp_path)


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from toolchain.models.reader import read_model
from toolchain.plan.planner import make_plan
from toolchain.quantize.streaming.datafree import quantize_stream
from toolchain.core.environment import peak_memory_bytes
import modelopt.torch.export.convert_hf_config, torch, transformers
transformers.AutoConfig.from_pretrained({source!r})
info = read_model({source!r})
plan = make_plan(info, format="w4a16_nvfp4", policy="all-linear", recipe="window")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = peak_memory_bytes()
resource.setrlimit(resource.RLIMIT_AS, (used + {allowed}, used + {allowed}))
quantize_stream(plan, Path({out!r}), device="cpu", threads=2)
print(peak_memory_bytes() - before)
"""


def test_a_model_far_larger_than_the_memory_that_is_allowed(tmp_path: Path) -> None:
    """600 MB of weights in less than 400 MB beyond what the libraries take, with address space limited as well."""
    from tests.tiny import make_tiny

    source = make_tiny(
        "qwen3_moe", tmp_path / "source", hidden_size=1024, moe_intermediate_size=1024, num_experts=48
    )
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 550_000_000
    root = Path(__file__).resolve().parent.parent
    script = LIMITED.format(
        root=str(root), source=str(source), out=str(tmp_path / "out"), allowed=600_000_000
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout) < 400_000_000
    assert audit(tmp_path / "out").passed


def test_the_command_streams_when_asked_and_when_memory_is_short(
    tiny: Tiny, tmp_path: Path, toolchain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("quantize", tiny("qwen3_moe"), "--format", "w4a16_nvfp4", "--json")
    made = {}
    for name, words in (("asked", ["--stream"]), ("memory", ["--no-stream"]), ("default", [])):
        ran = toolchain(*base, "--output", tmp_path / name, *words)
        assert ran.status == 0, ran.err
        made[name] = ran.json.get("streamed")
    assert made == {"asked": "data-free", "memory": None, "default": None}
    monkeypatch.setattr("toolchain.quantize.streaming.choice.free_memory_bytes", lambda: 1000)
    ran = toolchain(*base, "--output", tmp_path / "short")
    assert (
        ran.json["streamed"] == "data-free"
        and "streaming shard by shard, which writes the same bytes" in ran.err
    )
    assert files(tmp_path / "asked") == files(tmp_path / "memory") == files(tmp_path / "short")
    code = Path(__file__).parent.parent / "toolchain" / "core"
    texts = ("--calib-data", code, "--calib-samples", 2, "--calib-length", 32)
    needs = ("quantize", tiny("qwen3_moe"), "--format", "nvfp4", *texts, "--output", tmp_path / "n", "--json")
    ran = toolchain(*needs)
    assert ran.status == 0 and ran.json["streamed"] == "layers"
    assert "streaming layer by layer, which writes the same bytes" in ran.err


def test_an_engine_whose_checkpoint_is_streamed(
    tiny: Tiny, tmp_path: Path, toolchain: Callable[..., Any]
) -> None:
    where = ("--output", tmp_path / "engine", "--triton-output", tmp_path / "repository")
    command = ("engine", tiny("qwen3_moe"), "--format", "nvfp4", "--recipe", "pinned", "--stream", *where)
    made = toolchain(*command, "--json")
    assert made.status == 0, made.err
    assert toolchain("verify", tmp_path / "engine", "--manifest").status == 0
    again = toolchain(*command)
    assert again.status == 0 and "quantize: unchanged, skipped" in again.err
