"""Tokens and reference logits, written once, so that every method of every environment sees the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.accuracy.places import DATA, MODELS
from toolchain.data.texts import read_texts
from toolchain.data.tokenizer import load_tokenizer
from toolchain.evaluate.tokens import encode_samples, token_hash
from toolchain.plan.types import Calibration
from toolchain.quantize.calibration import load_calibration

WINDOWS, LENGTH = 64, 512
"""Held-out tokens that are judged on: 32k, in windows that are spread over all held-out files."""
SAMPLES, BATCH = 32, 4
"""Calibration: samples of ``LENGTH`` tokens, and how many go through the model at a time."""


def calibration_tokens(model: str, seed: int) -> torch.Tensor:
    """[SAMPLES, LENGTH] int64: what the toolchain itself draws for this seed."""
    settings = Calibration(data="", samples=SAMPLES, length_tokens=LENGTH, seed=seed)
    return load_calibration(settings, MODELS / model).tokens


def calibration_file(model: str, seed: int) -> Path:
    """The same tokens for another environment."""
    path = DATA / f"{model}-calibration-{seed}.safetensors"
    if not path.is_file():
        _save({"tokens": calibration_tokens(model, seed)}, path)
    return path


def evaluation_file(model: str) -> Path:
    """``tokens`` [WINDOWS, LENGTH] int64."""
    path = DATA / f"{model}-evaluation.safetensors"
    if not path.is_file():
        directory = MODELS / model
        samples = read_texts(directory / "evaluation.jsonl")
        tokens = encode_samples(
            load_tokenizer(directory), samples, max_tokens=WINDOWS * LENGTH, window=LENGTH
        )
        _save({"tokens": torch.tensor(tokens).view(WINDOWS, LENGTH)}, path)
    return path


def evaluation_tokens(model: str) -> torch.Tensor:
    return load_file(evaluation_file(model))["tokens"]


def evaluation_hash(model: str) -> str:
    return token_hash(evaluation_tokens(model).flatten().tolist())


def tokens_hash(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def reference_logits(model: str) -> Path:
    """``logits`` [WINDOWS, LENGTH, V] float32 of the source: its BF16 weights, computed in float32."""
    weights = MODELS / model / "model.safetensors"
    identity = f"{weights.stat().st_mtime_ns}"
    path = DATA / f"{model}-reference.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("identity") == identity:
                return path
    loaded = load_plain(model, torch.float32)
    tokens = evaluation_tokens(model)
    logits = torch.cat([loaded(input_ids=part, use_cache=False).logits for part in tokens.split(BATCH)])
    _save({"logits": logits}, path, {"identity": identity})
    return path


@torch.no_grad()
def load_plain(model: str, dtype: torch.dtype | str) -> Any:
    """As transformers loads it: fused experts."""
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    return AutoModelForCausalLM.from_pretrained(
        MODELS / model, dtype=dtype, experts_implementation="eager"
    ).eval()


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, partial, metadata)
    partial.replace(path)
