"""How fast `toolchain verify` reads: against a plain read of the same files, and what memory it takes.

    python benchmarks/audit.py [--size-gb 8] [--rounds 3] [--directory DIR]

Writes a synthetic NVFP4 checkpoint with the shapes of Qwen3-30B-A3B (128 experts of 768 in each layer, hidden size
2048), as many layers as the size asks for, in shards of 2 GB; random bytes, valid scales. Then, in turns: every file
read from beginning to end by one thread, and the audit in a process of its own. *Cold*: the pages of the files are
dropped before (``posix_fadvise``); *warm*: they are in memory. Peak memory is what the operating system counted for the
process (``ru_maxrss``), interpreter and libraries included. The files are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "audit.json"
HIDDEN, WIDTH, EXPERTS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2048, 768, 128, 32, 4, 128, 32768
SHARD = 2 * 10**9
CHUNK = 8 << 20
POOL = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)
"""Random bytes that tensors take their content from."""
SIZES = {"U8": 1, "F8_E4M3": 1, "F32": 4, "BF16": 2}
Tensor = tuple[str, str, tuple[int, ...]]


def tensors(layers: int) -> Iterator[Tensor]:
    """(name, dtype, shape) of every tensor."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        head = f"model.layers.{layer}"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{head}.self_attn.{name}_proj.weight", "BF16", (heads * HEAD_DIM, HIDDEN)
        yield f"{head}.self_attn.o_proj.weight", "BF16", (HIDDEN, HEADS * HEAD_DIM)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            yield f"{head}.{norm}.weight", "BF16", (HEAD_DIM,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{head}.{norm}.weight", "BF16", (HIDDEN,)
        yield f"{head}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, rows, columns in (
                ("gate", WIDTH, HIDDEN),
                ("up", WIDTH, HIDDEN),
                ("down", HIDDEN, WIDTH),
            ):
                module = f"{head}.mlp.experts.{expert}.{name}_proj"
                yield f"{module}.weight", "U8", (rows, columns // 2)
                yield f"{module}.weight_scale", "F8_E4M3", (rows, columns // 16)
                yield f"{module}.weight_scale_2", "F32", ()
                yield f"{module}.input_scale", "F32", ()
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * SIZES[dtype]


def content(dtype: str, size: int, offset: int) -> memoryview:
    """Bytes of a tensor: any for packed codes, codes of finite numbers otherwise."""
    if dtype == "F32":
        return np.full(size // 4, 1e-3, dtype=np.float32).data.cast("B")
    pool = {"U8": POOL, "F8_E4M3": POOL_SCALES, "BF16": POOL_BF16}[dtype]
    start = offset * 4096 % (len(pool) - CHUNK)
    if size <= len(pool) - start:
        return pool[start : start + size].data
    return np.resize(pool, size).data


POOL_SCALES = POOL % 0x40 + 0x20
POOL_BF16 = (POOL.view(np.uint16) & 0xBFFF).view(np.uint8)
"""Without the highest bit of the exponent nothing is infinite."""


def write(directory: Path, size: int) -> tuple[int, int]:
    """Shards, index and configs of about ``size`` bytes; returns (bytes, tensors)."""
    per_layer = sum(size_of(dtype, shape) for name, dtype, shape in tensors(1) if ".layers." in name)
    layers = max(1, round((size - 2 * size_of("BF16", (VOCABULARY, HIDDEN))) / per_layer))
    found, weight_map, total, shard = list(tensors(layers)), {}, 0, 0
    while found:
        part, used = [], 0
        while found and (not part or used + size_of(*found[0][1:]) <= SHARD):
            part.append(found.pop(0))
            used += size_of(*part[-1][1:])
        shard += 1
        file = f"model-{shard:05d}.safetensors"
        write_shard(directory / file, part)
        weight_map |= {name: file for name, _, _ in part}
        total += used
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    write_configs(directory, layers)
    return total, len(weight_map)


def write_shard(path: Path, part: list[Tensor]) -> None:
    header, position = {}, 0
    for name, dtype, shape in part:
        end = position + size_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for number, (_, dtype, shape) in enumerate(part):
            handle.write(content(dtype, size_of(dtype, shape), number))
        handle.flush()
        os.fsync(handle.fileno())


def write_configs(directory: Path, layers: int) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=VOCABULARY,
        intermediate_size=6144, num_experts_per_tok=8, tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip
    excluded = ["lm_head", "model.embed_tokens"]
    for layer in range(layers):
        excluded += [f"model.layers.{layer}.self_attn*", f"model.layers.{layer}.mlp.gate"]
    producer = {"name": "modelopt", "version": "0.47.0"}
    inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    legacy = {"producer": producer, "quantization": {**inner, "exclude_modules": excluded}}
    (directory / "hf_quant_config.json").write_text(json.dumps(legacy))
    flat = {"producer": producer, "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    value = {**config.to_dict(), "quantization_config": {**flat, "ignore": excluded}}
    (directory / "config.json").write_text(json.dumps(value, default=str))


def forget(directory: Path) -> None:
    """Drop the pages of the files: the next read comes from the disk."""
    for path in directory.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def plain_read(directory: Path) -> float:
    """Seconds to read every file once, one after the other."""
    buffer = bytearray(CHUNK)
    started = time.monotonic()
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.monotonic() - started


SCRIPT = """
import json, sys, time
started = time.monotonic()
from pathlib import Path
from toolchain.checkpoint.audit import audit
verdict = audit(Path(sys.argv[1]))
found = {"passed": verdict.passed, "findings": len(verdict.findings), "seconds": time.monotonic() - started}
json.dump(found, sys.stdout)
"""


def run_audit(directory: Path) -> dict[str, Any]:
    """Wall clock of a process that audits and ends, and its peak memory."""
    before = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - before
    if status:
        raise SystemExit(f"the audit ended with status {status}")
    cpu = usage.ru_utime + usage.ru_stime
    return {
        **json.loads(said),
        "process_seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def measure(directory: Path, total: int, rounds: int, *, cold: bool) -> dict[str, Any]:
    """Plain reads and audits in turns."""
    plain, audits = [], []
    if not cold:
        plain_read(directory)  # the audit itself leaves the page cache as it was
    for _ in range(rounds):
        for kind in (plain_read, run_audit):
            if cold:
                forget(directory)
            found: Any = kind(directory)
            (plain if kind is plain_read else audits).append(found)
            print(f"{'cold' if cold else 'warm'} {kind.__name__}: {found}", file=sys.stderr)
    read, process = statistics.median(plain), statistics.median(item["process_seconds"] for item in audits)
    return {
        "plain_read_gb_per_s": round(total / read / 1e9, 3),
        "audit_gb_per_s": round(total / process / 1e9, 3),
        "audit_seconds": round(process, 2),
        "audit_over_plain": round(process / read, 3),
        "audit_cpu_seconds": round(statistics.median(item["cpu_seconds"] for item in audits), 2),
        "load_average_after": [round(value, 2) for value in os.getloadavg()],
        "peak_mib": round(max(item["peak_bytes"] for item in audits) / 2**20),
        "plain_seconds_each": [round(value, 2) for value in plain],
        "audit_seconds_each": [round(item["process_seconds"], 2) for item in audits],
        "findings": audits[-1]["findings"],
        "passed": audits[-1]["passed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size-gb", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    directory = Path(tempfile.mkdtemp(prefix="audit-", dir=given.directory))
    try:
        total, count = write(directory, int(given.size_gb * 1e9))
        print(f"{total / 1e9:.2f} GB, {count} tensors in {directory}", file=sys.stderr)
        load = os.getloadavg()
        found = {
            "bytes": total,
            "tensors": count,
            "cpus": os.cpu_count(),
            "load_average_before": [round(value, 2) for value in load],
            "cold": measure(directory, total, given.rounds, cold=True),
            "warm": measure(directory, total, given.rounds, cold=False),
        }
    finally:
        shutil.rmtree(directory)
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
