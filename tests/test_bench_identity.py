"""What a benchmark says of the engine and of the memory that it took."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.engine_dirs import write_engine
from toolchain.bench.identity import describe_engine
from toolchain.bench.memory import memory_of, peak_memory_of

MIB = 2**20


def test_a_checkpoint_and_the_engine_of_it_are_the_same_model(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = tiny("qwen3_moe")
    plain = describe_engine(checkpoint)
    assert plain is not None and plain["manifest_sha256"] is None and plain["format"] == "source"
    config = AutoConfig.from_pretrained(checkpoint)
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    width = {"torch.bfloat16": 2, "torch.float32": 4}[str(config.dtype)]
    assert plain["kv_bytes_per_token"] == values * width
    assert plain["checkpoint_bytes"] == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))

    engine = write_engine(tmp_path / "engine", checkpoint=checkpoint)
    manifest = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**manifest, "model": {"identity": plain["model"]}}))
    found = describe_engine(engine)
    assert found is not None and found["model"] == plain["model"] and found["format"] == "fp8"
    # The local target rounds the KV cache's values and keeps them in the model's dtype.
    assert found["kv_bytes_per_token"] == plain["kv_bytes_per_token"]


def test_what_is_neither_has_no_identity(tmp_path: Path) -> None:
    assert describe_engine(None) is None and describe_engine(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    found = describe_engine(tmp_path)  # a config that nobody can plan for: sizes only
    assert found is not None and found.get("model") is None and found["checkpoint_bytes"] is None


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_peaks_of_other_processes_are_added() -> None:
    script = f"kept = b'x' * (64 * {MIB}); del kept; print('ready', flush=True); input()"
    children = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        both = peak_memory_of([child.pid for child in children])
        assert both is not None and 128 * MIB < both < 400 * MIB
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert peak_memory_of([child.pid for child in children]) is None
    assert memory_of("127.0.0.1:8001") is None
