"""Write a synthetic checkpoint: random weights at the speed of the disk.

Random bits through the quantiles of the normal distribution: every number is drawn on its own, no part repeats another,
and a tensor takes no longer than writing it does. FP8 blocks reach 448, each with a scale of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from benchmarks.streaming.architectures import BY_NAME, VOCABULARY, Architecture, Tensor
from toolchain.checkpoint.shard_file import ShardFile, TensorSpec
from toolchain.checkpoint.writer import shard_names
from toolchain.core.files import atomic_write_json

SHARD_BYTES = 512_000_000
"""The hub's are of 4 to 5 GB, of models some hundred times as large; with these the smallest has three, so that a peer
that works by shards can use two cores."""
CHUNK = 1 << 22
DEVIATION = 0.02
"""Standard deviation of the weights, about that of trained ones."""
RECORD = "streaming-benchmark.json"


def make_model(architecture: str, size_gb: int, directory: Path) -> dict[str, Any]:
    """Write it beside its name, then rename; return what its record says. Nothing is done when it is there."""
    record = directory / RECORD
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found
    design = BY_NAME[architecture]
    layers = design.layers_of(size_gb * 10**9)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = _write_shards(partial, design, layers, np.random.Generator(np.random.SFC64(size_gb)))
    _write_config(partial, design, layers)
    made = {"architecture": architecture, "size_gb": size_gb, "layers": layers, "tensor_bytes": size}
    atomic_write_json(partial / RECORD, made)
    partial.rename(directory)
    return made


def _write_shards(directory: Path, design: Architecture, layers: int, random: np.random.Generator) -> int:
    shards: list[list[Tensor]] = [[]]
    for tensor in design.tensors(layers):
        if shards[-1] and sum(item.bytes for item in shards[-1]) + tensor.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        specs = [TensorSpec(name=item.name, dtype=item.dtype, shape=item.shape) for item in shard]
        file = ShardFile(directory / name, specs)
        for item in shard:
            offset = 0
            for part in content(item, random):
                file.put_bytes(item.name, part, offset=offset)
                offset += part.nbytes
            weight_map[item.name] = name
        file.close()
    total = sum(item.bytes for shard in shards for item in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic_write_json(directory / "model.safetensors.index.json", index)
    return total


def content(tensor: Tensor, random: np.random.Generator) -> Iterator[np.ndarray]:
    """uint8 arrays: the bytes of ``tensor`` in order."""
    count = tensor.bytes // {"BF16": 2, "F32": 4, "F8_E4M3": 1}[tensor.dtype]
    if tensor.kind == "norm":
        yield np.full(count, 0x3F80, dtype=np.uint16).view(np.uint8)
    elif tensor.kind == "scale":
        yield (random.uniform(0.5, 2, count) * DEVIATION * 4 / 448).astype(np.float32).view(np.uint8)
    elif tensor.kind == "bias":
        yield np.zeros(count, dtype=np.float32).view(np.uint8)
    else:
        table = BF16_QUANTILES if tensor.dtype == "BF16" else E4M3_QUANTILES
        bits = np.uint16 if tensor.dtype == "BF16" else np.uint8
        for start in range(0, count, CHUNK):
            drawn = np.frombuffer(
                random.bytes(min(CHUNK, count - start) * np.dtype(bits).itemsize), dtype=bits
            )
            yield table[drawn].view(np.uint8)


def _quantiles(count: int) -> torch.Tensor:
    normal = NormalDist()
    return torch.tensor([normal.inv_cdf((index + 0.5) / count) for index in range(count)])


BF16_QUANTILES = (_quantiles(1 << 16) * DEVIATION).to(torch.bfloat16).view(torch.uint16).numpy()
_ROUGH = _quantiles(1 << 8)
E4M3_QUANTILES = (_ROUGH * (448 / _ROUGH.max())).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _write_config(directory: Path, design: Architecture, layers: int) -> None:
    import transformers

    from tests.tiny import write_tokenizer

    settings = {**design.settings, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    others = dict(tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = getattr(transformers, design.config_class)(**settings, **others, dtype="bfloat16")
    made = config.to_dict()
    made["architectures"] = [design.config_class.replace("Config", "ForCausalLM")]
    if design.quantization is not None:
        made["quantization_config"] = design.quantization
    atomic_write_json(directory / "config.json", made)
    write_tokenizer(directory)
