"""Command lines that serve one checkpoint: vLLM and SGLang, with notes, or the reason why one does not load it.

Options: ``vllm serve --help`` (docs.vllm.ai, engine arguments, parallelism) and ``sglang.launch_server --help``
(docs.sglang.io, server arguments, quantized KV cache).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from toolchain.deploy.loads import TITLES, find_row, why_not

KV_DTYPE = {
    "vllm": {"fp8": "fp8", "fp8_cast": "fp8"},
    "sglang": {"fp8": "fp8_e4m3", "fp8_cast": "fp8_e4m3"},
}
"""Runtime -> KV cache format -> ``--kv-cache-dtype``; others are left to what the checkpoint says."""
NVFP4_ALGOS = ("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a command line says about an engine."""

    model: str
    """Directory or hub id, as the server will see it."""
    name: str
    architecture: str
    quant_algo: str
    algos: frozenset[str]
    """quant_algo of every format that some part has."""
    kv_cache: str
    is_moe: bool
    tp: int = 1
    ep: int = 1
    pp: int = 1
    max_batch_size: int | None = None
    max_seq_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class Command:
    runtime: str
    words: tuple[str, ...] = ()
    """Empty where the runtime does not load the checkpoint."""
    refused: str = ""
    """Why it does not."""
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    def to_json(self) -> dict[str, object]:
        return {
            "runtime": self.runtime,
            "command": list(self.words),
            "refused": self.refused,
            "notes": list(self.notes),
        }


def peer_command(runtime: str, checkpoint: Checkpoint) -> Command:
    """The command of ``runtime`` (``vllm`` or ``sglang``) for ``checkpoint``."""
    refused = why_not(
        runtime,
        quant_algo=checkpoint.quant_algo,
        algos=checkpoint.algos,
        architecture=checkpoint.architecture,
        is_moe=checkpoint.is_moe,
    )
    if refused:
        return Command(runtime=runtime, refused=refused)
    words = _vllm(checkpoint) if runtime == "vllm" else _sglang(checkpoint)
    return Command(runtime=runtime, words=tuple(words), notes=_notes(runtime, checkpoint))


def _format_options(runtime: str, checkpoint: Checkpoint) -> list[str]:
    words = []
    published = checkpoint.algos == {"W4A16_MXFP4"}
    row = find_row(runtime, "W4A16_MXFP4" if published else checkpoint.quant_algo)
    if row is not None and row.option:
        words += ["--quantization", row.option]
    dtype = KV_DTYPE[runtime].get(checkpoint.kv_cache)
    return [*words, "--kv-cache-dtype", dtype] if dtype else words


def _sized(pairs: list[tuple[str, int | None]]) -> list[str]:
    return [word for option, value in pairs if value for word in (option, str(value))]


def _above_one(value: int) -> int | None:
    return value if value > 1 else None


def _vllm(checkpoint: Checkpoint) -> list[str]:
    """vLLM has no size of expert parallelism: its ranks are those of tensor (times data) parallelism."""
    pairs = [
        ("--tensor-parallel-size", _above_one(checkpoint.tp)),
        ("--pipeline-parallel-size", _above_one(checkpoint.pp)),
        ("--max-model-len", checkpoint.max_seq_len),
        ("--max-num-seqs", checkpoint.max_batch_size),
    ]
    words = ["vllm", "serve", checkpoint.model, *_format_options("vllm", checkpoint), *_sized(pairs)]
    return [*words, "--enable-expert-parallel"] if checkpoint.is_moe and checkpoint.ep > 1 else words


def _sglang(checkpoint: Checkpoint) -> list[str]:
    pairs = [
        ("--tp-size", _above_one(checkpoint.tp)),
        ("--pp-size", _above_one(checkpoint.pp)),
        ("--ep-size", _above_one(checkpoint.ep) if checkpoint.is_moe else None),
        ("--context-length", checkpoint.max_seq_len),
        ("--max-running-requests", checkpoint.max_batch_size),
    ]
    start = ["python3", "-m", "sglang.launch_server", "--model-path", checkpoint.model]
    return [*start, *_format_options("sglang", checkpoint), *_sized(pairs)]


def _notes(runtime: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    title = TITLES[runtime]
    notes = [f"Not run with {title} where this was made."]
    if checkpoint.quant_algo in NVFP4_ALGOS and runtime == "vllm":
        notes.append(
            "On GPUs without FP4 matmuls vLLM computes NVFP4 weights with 16-bit activations (Marlin), and says so."
        )
    if checkpoint.quant_algo in NVFP4_ALGOS and runtime == "sglang":
        notes.append("SGLang's kernels for NVFP4 need Blackwell.")
    if checkpoint.kv_cache == "nvfp4":
        notes.append(
            f"The KV cache is NVFP4: leave `--kv-cache-dtype auto`, and use a {title} that reads it."
        )
    if runtime == "vllm" and checkpoint.is_moe and 1 < checkpoint.ep < checkpoint.tp:
        notes.append(
            f"The plan has ep {checkpoint.ep} of tp {checkpoint.tp}: vLLM spreads experts over all tp ranks instead."
        )
    return tuple(notes)
