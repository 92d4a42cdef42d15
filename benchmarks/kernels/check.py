"""Every kernel on the GPU: random inputs against float64, poisoned outputs, CUDA graphs against plain runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.decoding import SMOKE as SMOKE_MODEL
from benchmarks.kernels.decoding import packed_model
from benchmarks.kernels.experts import LOOSE, TIGHT, Ours, config_directory, random_ids
from benchmarks.kernels.layers import FORMATS, SMOKE, MoeLayer, stored
from toolchain.codecs import get_codec
from toolchain.kernels.kinds import kind_of
from toolchain.kernels.launch import multiply, round_inputs
from toolchain.kernels.packing import pack
from toolchain.kernels.settings import Settings

LAYER = MoeLayer(name="check", experts=16, top_k=4, hidden=1024, inner=384)
ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZER_S = 900
SETTINGS = (
    Settings(block_m=16, block_n=128, block_k=128),
    Settings(block_m=16, block_n=128, block_k=128, split_k=2),
    Settings(block_m=64, block_n=128, block_k=128, warps=8),
)


def check(device: torch.device, *, smoke: bool = False) -> dict[str, Any]:
    """``problems`` lists what is wrong; ``errors``: relative RMS by case. Fresh random numbers in every run."""
    torch.manual_seed(torch.seed() % 2**31)
    found = dict([*_experts(device, smoke), *_matrices(device, smoke), *_graphs(device)])
    problems = [
        f"{case}: relative RMS {error:.4f} > {allowed}"
        for case, (error, allowed) in found.items()
        if not error <= allowed
    ]
    return {"problems": problems, "errors": {case: error for case, (error, _) in found.items()}}


def _experts(device: torch.device, smoke: bool) -> Iterator[tuple[str, tuple[float, float]]]:
    """Whole layers, default settings: one token, few, many, all to one expert, some to none."""
    layer = SMOKE if smoke else LAYER
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for format in FORMATS:
        ours = Ours(layer, format, device)
        allowed = TIGHT if ours.gate_up.kind.rounding == "none" else LOOSE
        for name, ids in _routes(layer, device, smoke):
            x = torch.randn((len(ids), layer.hidden), device=device).to(dtype)
            weights = torch.rand(ids.shape, device=device)
            few = slice(0, 8)
            known = torch.where(ids < layer.experts, ids, 0)
            expected = ours.reference(x[few], known[few], torch.where(ids < layer.experts, weights, 0.0)[few])
            out = ours.module(x, ids, weights)
            yield f"{format} experts, {name}", _error(out[few], expected, allowed)


def _routes(layer: MoeLayer, device: torch.device, smoke: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for tokens in (1, 20) if smoke else (1, 7, 64, 300):
        yield f"{tokens} tokens", random_ids(layer, tokens, device)
    yield "one expert", torch.full((9, 1), layer.experts - 1, device=device)
    ids = random_ids(layer, 24, device)
    yield "some of no expert", torch.where(ids == 1, layer.experts, ids)


def _matrices(device: torch.device, smoke: bool) -> Iterator[tuple[str, tuple[float, float]]]:
    """Single Linears of odd sizes into outputs that are full of NaN."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    for format in FORMATS:
        kind = kind_of(format, capability)
        assert kind is not None
        n, k = 206, 640
        tensors = stored(format, n, k, device)
        packed = pack(kind, [[tensors]], dtype)
        weight = get_codec(format).unpack(tensors, torch.float32).double()
        for settings in SETTINGS[:1] if smoke else SETTINGS:
            for rows in (1, 33):
                x = torch.randn((rows, k), device=device).to(dtype)
                rounds = kind.rounding != "none"
                seen = get_codec(format).quantize_input(x.float(), tensors) if rounds else x
                given = round_inputs(x, kind, packed.input_scale) if rounds else x
                out = torch.full((rows, n), float("nan"), device=device, dtype=dtype)
                multiply(packed, given, replace(settings), out_dtype=dtype, out=out)
                blocks = f"{settings.block_m} x {settings.block_n}, split {settings.split_k}"
                yield (
                    f"{format} [{rows}, {k}] x [{n}, {k}], {blocks}",
                    _error(out, seen.double() @ weight.T, TIGHT),
                )


def _graphs(device: torch.device) -> Iterator[tuple[str, tuple[float, float]]]:
    """A step replayed from a CUDA graph has the logits of the same step run; rows beside it change nothing."""
    from toolchain.runtime.model import Runner
    from toolchain.runtime.paged.decoder import Decoder
    from toolchain.runtime.paged.setup import Paging

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with config_directory(SMOKE_MODEL) as folder, torch.inference_mode():
        model = packed_model(Path(folder), "nvfp4", device, dtype)
        runner = Runner(model=model, device=device, paging=Paging(max_batch_size=4, max_seq_len=128))
        runner.probe()
        assert runner.paged is not None, runner.notes
        pages = runner.paged.pages
        for slot in range(4):
            pages.table[slot, :2] = torch.tensor([2 * slot + 1, 2 * slot + 2], dtype=torch.int32)
        options = {"logits_to_keep": 1}
        eager = Decoder(model, pages, device=device, max_rows=4, graphs=False, options=options)
        # Pages that are full of something, and steps of several sizes in turn: one that reads what the step before had
        # been given, or another's pages, is found.
        for layer in pages.layers:
            layer.keys.normal_()
            layer.values.normal_()
        generator = torch.Generator().manual_seed(0)
        for turn, rows in enumerate((3, 1, 2, 4, 3, 1, 4)):
            slots = torch.randperm(4, generator=generator)[:rows].tolist()
            tokens = torch.randint(SMOKE_MODEL["vocab_size"], (rows,), generator=generator).tolist()
            lengths = torch.randint(1, 128, (rows,), generator=generator).tolist()
            step = (tokens, slots, lengths)
            expected = eager.step(*step).double().clone()
            yield f"decoding, turn {turn}", _error(runner.paged.decoder.step(*step), expected, 1e-3)


def _error(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> tuple[float, float]:
    return float((actual.double() - expected).norm() / expected.norm()), allowed


def sanitize() -> dict[str, Any]:
    """compute-sanitizer's memcheck over one run of the small layers; what it said where the tool is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    command = [tool, "--error-exitcode", "7", sys.executable, "-m", "benchmarks.kernels", "check", "--small"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_S)
    except subprocess.TimeoutExpired:
        return {"ran": False, "problems": [f"compute-sanitizer did not end within {SANITIZER_S} s"]}
    last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    problems = (
        []
        if done.returncode == 0
        else [f"compute-sanitizer: exit {done.returncode}, {(done.stdout + done.stderr)[-800:]}"]
    )
    return {"ran": True, "summary": last, "problems": problems}
