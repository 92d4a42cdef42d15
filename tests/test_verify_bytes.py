"""Every byte is looked at: codes that are no numbers, zeros, manifests; in bounded memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Made
from tests.planning import plan_for
from toolchain.checkpoint.audit import audit, codes
from toolchain.checkpoint.audit.reading import Buffer, ShardFile
from toolchain.checkpoint.audit.scan import CHUNK, Scan, Task
from toolchain.checkpoint.manifest import check_manifest
from toolchain.checkpoint.raw import Place
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Silent
from toolchain.quantize.job import quantize

Tiny = Callable[[str], Path]
DTYPES = {
    "F8_E4M3": (np.uint8, torch.float8_e4m3fn),
    "BF16": (np.uint16, torch.bfloat16),
    "F16": (np.uint16, torch.float16),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_judged_as_torch_judges_its_value(dtype: str) -> None:
    """All codes of the dtype, one at a time and among others at every place of a word."""
    unsigned, torch_dtype = DTYPES[dtype]
    every = np.arange(1 << (8 * np.dtype(unsigned).itemsize), dtype=np.uint32).astype(unsigned)
    values = (
        torch.from_numpy(every.view(np.int8 if unsigned is np.uint8 else np.int16).copy())
        .view(torch_dtype)
        .float()
    )
    kind, scratch = codes.KINDS[dtype], codes.Scratch(1 << 20)
    finite = values.isfinite().numpy()
    step = 1 if len(every) == 256 else 97
    for place in range(5):
        for code, is_finite in zip(every[::step], finite[::step], strict=True):
            around = np.ones(5, dtype=unsigned)
            around[place] = code
            assert scratch.has_non_finite(around.view(np.uint8), kind) is not bool(is_finite), code
    assert codes.non_finite(every.view(np.uint8), kind) == int((~finite).sum())
    low = int(((values <= 0).numpy() & finite).sum())
    assert codes.bad_scales(every.view(np.uint8), kind) == (int((~finite).sum()), low)
    good = every[finite & (values > 0).numpy()]
    assert codes.bad_scales(good.view(np.uint8), kind) == (0, 0)
    assert codes.is_zero(np.zeros(7, dtype=np.uint8), dtype) and not codes.is_zero(good.view(np.uint8), dtype)


def test_float32_scales_by_their_sign_and_exponent() -> None:
    values = torch.tensor([1.0, 0.0, -0.0, -2.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3e38])
    assert codes.bad_scales(values.numpy().view(np.uint8), codes.KINDS["F32"]) == (3, 3)
    scratch = codes.Scratch(1 << 10)
    for value in values:
        data = torch.tensor([1.0, float(value), 2.0]).numpy().view(np.uint8)
        assert scratch.has_non_finite(data, codes.KINDS["F32"]) is not bool(value.isfinite())


@pytest.mark.parametrize("size", [1, 7, 4096, CHUNK - 1, CHUNK + 3])
@pytest.mark.parametrize("first", [0, 5])
def test_a_bad_code_is_found_wherever_it_is(tmp_path: Path, size: int, first: int) -> None:
    """At the ends and around the borders of what is read at a time, at odd offsets, between neighbours."""
    for at in sorted({0, size - 1, size // 2, min(CHUNK, size - 1)}):
        data = np.full(first + size + 3, 0x38, dtype=np.uint8)
        data[first + at] = 0xFF
        (tmp_path / "x").write_bytes(data.tobytes())
        spans = {"before": (0, first), "it": (first, size), "after": (first + size, 3)}
        tasks = [
            Task(name=name, place=Place(file="x", start=start, size=length), dtype="F8_E4M3", scale=False)
            for name, (start, length) in spans.items()
        ]
        seen = Scan(tmp_path, tasks).result(Silent())
        assert {name: found.not_finite for name, found in seen.items()} == {"before": 0, "it": 1, "after": 0}
        assert seen["it"].elements == size


@pytest.mark.parametrize("size", [1, 4095, 4096, 100_003])
def test_bytes_are_the_same_cached_or_not(tmp_path: Path, size: int) -> None:
    """At any offset, up to the last byte."""
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    path, buffer = tmp_path / "x", Buffer(size)
    path.write_bytes(data.tobytes())
    for is_cached in (True, False):
        if not is_cached and hasattr(os, "posix_fadvise"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        with ShardFile(path, start=0, size=size) as shard:
            for start in sorted({0, size // 3, size - 1}):
                for length in sorted({1, size - start}):
                    assert np.array_equal(shard.read(buffer, start, length), data[start : start + length])
            with pytest.raises(ToolchainError, match="ends at byte"):
                shard.read(Buffer(size + 1), 0, size + 1)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    task = Task(name="a", place=Place(file="x", start=50, size=100), dtype="U8", scale=False)
    with pytest.raises(ToolchainError, match="ends at byte 100") as caught:
        Scan(tmp_path, [task]).result(Silent())
    assert caught.value.code == "TC-015"


MEMORY = """
import resource, sys
from pathlib import Path
from toolchain.checkpoint.audit.reading import Buffer, ShardFile
from toolchain.checkpoint.audit.scan import Scan, Task
from toolchain.checkpoint.raw import Place
from toolchain.core.progress import Silent

size = 1 << 30
tasks = [Task(name=str(n), place=Place(file="x", start=n * size // 4, size=size // 4), dtype="BF16", scale=False)
         for n in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seen = Scan(Path(sys.argv[1]), tasks, threads=2).result(Silent())
assert all(found.zero for found in seen.values())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A gibibyte (a hole: it takes no disk) in two threads: their buffers, counted by the operating system."""
    with (tmp_path / "x").open("wb") as handle:
        handle.truncate(1 << 30)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert int(done.stdout) < 6 * CHUNK + (32 << 20)


@pytest.fixture(scope="module")
def sound(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, format_name: str) -> Path:
        if (kind, format_name) not in made:
            output = tmp_path_factory.mktemp("sound") / "out"
            quantize(plan_for(tiny(kind), format_name), output, device="cpu")
            made[kind, format_name] = output
        return made[kind, format_name]

    return get


@pytest.mark.parametrize(
    ("kind", "format_name", "name"),
    [
        ("qwen3_moe", "nvfp4", "model.layers.1.self_attn.q_proj.weight"),
        ("mixtral", "fp8", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        ("llama", "fp8_block", "model.norm.weight"),
        ("qwen3_moe", "nvfp4", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_a_weight_that_is_no_number(
    sound: Callable[[str, str], Path], tmp_path: Path, kind: str, format_name: str, name: str
) -> None:
    """In a plain matrix, a router, a norm and an FP8 code alike."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(sound(kind, format_name), tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors[name].view(-1)[-1:] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    found = [(item.code, item.where) for item in audit(tmp_path / "bad").findings]
    assert found == [("TC-314", name)]


@pytest.mark.parametrize("format_name", ["nvfp4", "fp8", "int4_awq", "mxfp4"])
def test_an_expert_of_zeros(sound: Callable[[str, str], Path], tmp_path: Path, format_name: str) -> None:
    """A hole in a file that was copied half: well formed, and empty."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(sound("qwen3_moe", format_name), tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    found = [(item.code, item.where, item.severity) for item in audit(tmp_path / "bad").findings]
    assert found == [("TC-336", name, "warning")]


def test_leaked_quantizer_state(sound: Callable[[str, str], Path], tmp_path: Path) -> None:
    """As ModelOpt's export of compressed weights left it: `_scale` of a quantizer."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(sound("qwen3_moe", "nvfp4"), tmp_path / "bad")
    (tmp_path / "bad" / "plan.json").unlink()
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight_quantizer._scale"
    tensors[name] = torch.ones(4)
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    assert [(item.code, item.where) for item in audit(tmp_path / "bad").findings] == [("TC-313", name)]


# The manifest


def test_an_untouched_engine_passes(toolchain: Callable[..., Any], made: Made) -> None:
    ran = toolchain("verify", made.engine, "--manifest", "--json")
    assert ran.status == 0 and ran.json == {"directory": str(made.engine), "passed": True, "findings": []}


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(made: Made, tmp_path: Path) -> None:
    engine = made.copy_to(tmp_path / "copy").engine
    recorded = json.loads((engine / "engine.json").read_text())["files"]
    place = random.Random(0)
    for name in recorded:
        path = engine / name
        before = path.read_bytes()
        for at in {0, len(before) - 1, place.randrange(len(before))}:
            spoiled = bytearray(before)
            spoiled[at] ^= 1 << place.randrange(8)
            path.write_bytes(spoiled)
            assert [(item.code, item.where) for item in check_manifest(engine)] == [("TC-343", name)]
        path.write_bytes(before)
    assert check_manifest(engine) == []


def test_a_changed_manifest_and_a_changed_record_are_found(
    toolchain: Callable[..., Any], made: Made, tmp_path: Path
) -> None:
    engine = made.copy_to(tmp_path / "copy").engine
    for name in ("engine.json", "stages/quantize.json"):
        before = (engine / name).read_text()
        (engine / name).write_text(before.replace('"nvfp4"', '"nvfp5"', 1))
        assert (engine / name).read_text() != before
        found = check_manifest(engine)
        assert name in {item.where for item in found} and {item.code for item in found} == {"TC-343"}
        (engine / name).write_text(before)
    assert check_manifest(engine) == []


def test_missing_and_extra_files_are_named(toolchain: Callable[..., Any], made: Made, tmp_path: Path) -> None:
    engine = made.copy_to(tmp_path / "copy").engine
    (engine / "checkpoint" / "tokenizer.json").unlink()
    (engine / "checkpoint" / "model-00002.safetensors").write_bytes(b"")
    (engine / "notes.txt").write_text("mine")
    ran = toolchain("verify", engine, "--manifest")
    assert ran.status == 1
    assert "TC-343 error: checkpoint/tokenizer.json" in ran.out
    assert "TC-344 error: checkpoint/model-00002.safetensors" in ran.out
    assert "TC-344 warning: notes.txt" in ran.out


def test_a_directory_that_is_no_engine(toolchain: Callable[..., Any], tiny: Tiny, tmp_path: Path) -> None:
    assert toolchain("verify", tiny("llama"), "--manifest").status == 2
    (tmp_path / "engine.json").write_text("[]")
    assert toolchain("verify", tmp_path, "--manifest").status == 1
