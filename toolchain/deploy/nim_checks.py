"""What NIM would stumble over: a format that its backend does not read, and files that are missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from toolchain.core.errors import UsageError
from toolchain.core.files import read_json
from toolchain.core.findings import Finding, Severity
from toolchain.deploy.loads import why_not
from toolchain.deploy.serving import Checkpoint
from toolchain.triton.engine_dir import EngineDir

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
INDEX = "model.safetensors.index.json"
PUBLISHED_MXFP4 = frozenset({"W4A16_MXFP4"})
"""Such a checkpoint says what it is in config.json alone, as gpt-oss was published."""


def check_format(
    engine: EngineDir, checkpoint: Checkpoint, *, major: str, backend: str, backends: tuple[str, ...]
) -> Iterator[Finding]:
    """Whether the backend of that NIM reads the checkpoint. UsageError for a backend that it does not have."""
    if backend not in backends:
        raise UsageError(
            f"NIM {major}.x has no backend {backend!r}", hint=f"it has {', '.join(backends)}", code="TC-460"
        )
    if major == "2":
        refused = why_not(
            backend,
            quant_algo=checkpoint.quant_algo,
            algos=checkpoint.algos,
            architecture=checkpoint.architecture,
            is_moe=checkpoint.is_moe,
        )
        if refused:
            yield Finding(
                code="TC-460",
                where=f"NIM 2.x with {backend}",
                message=refused.rstrip("."),
                hint="`toolchain support` shows what TensorRT-LLM runs; NIM 1.x has it",
            )
        return
    if engine.target != "trtllm":
        yield Finding(
            code="TC-460",
            where="NIM 1.x with tensorrt_llm",
            message=f"the engine is of target {engine.target}: not planned for TensorRT-LLM's PyTorch backend",
            hint="`toolchain build ENGINE --target trtllm --gpu GPU` checks and plans the same checkpoint for it",
        )
        return
    yield Finding(
        code="TC-464",
        where="NIM 1.x with tensorrt_llm",
        message=f"planned for TensorRT-LLM {engine.manifest.get('target_version')}; NIM carries a release of its own",
        hint="compare with the release notes of the NIM image",
        severity="warning",
    )


def check_files(directory: Path, checkpoint: Checkpoint, *, major: str) -> Iterator[Finding]:
    """Every file that is missing, at once."""
    needed: dict[str, str] = {"config.json": "architecture and lengths are read from it"}
    if checkpoint.algos != PUBLISHED_MXFP4:
        needed["hf_quant_config.json"] = "without it the weights are taken for unquantized ones"
    needed["tokenizer_config.json"] = "the tokenizer's class and special tokens are read from it"
    for name, why in needed.items():
        if not (directory / name).is_file():
            yield _missing(directory / name, why, "error")
    if not any((directory / name).is_file() for name in TOKENIZERS):
        yield _missing(
            directory / TOKENIZERS[0], f"no tokenizer: none of {', '.join(TOKENIZERS)} is there", "error"
        )
    if not (directory / "generation_config.json").is_file():
        why = "sampling defaults and the tokens that end an answer are read from it"
        yield _missing(directory / "generation_config.json", why, "error" if major == "1" else "warning")
    yield from _chat_template(directory)
    yield from _shards(directory)


def check_readable(directory: Path) -> Iterator[Finding]:
    """Files that a container's own user cannot read: libraries that write to a temporary file first leave 0600."""
    closed = sorted(
        path.name for path in directory.iterdir() if path.is_file() and not path.stat().st_mode & 0o004
    )
    if closed:
        yield Finding(
            code="TC-465",
            where=str(directory),
            message=f"only its owner can read {', '.join(closed[:3])}{' and more' if len(closed) > 3 else ''}",
            hint=f"chmod -R a+rX {directory}",
            severity="warning",
        )


def _missing(path: Path, why: str, severity: Severity) -> Finding:
    hint = f"copy {path.name} from the source model into {path.parent}"
    return Finding(code="TC-461", where=str(path), message=f"missing; {why}", hint=hint, severity=severity)


def _chat_template(directory: Path) -> Iterator[Finding]:
    config = directory / "tokenizer_config.json"
    inline = config.is_file() and "chat_template" in read_json(config)
    if not inline and not any(directory.glob("chat_template*")):
        yield Finding(
            code="TC-462",
            where=str(directory),
            message="no chat template: /v1/chat/completions will fail, /v1/completions works",
            hint="copy chat_template.jinja from the source model",
            severity="warning",
        )


def _shards(directory: Path) -> Iterator[Finding]:
    shards = {path.name for path in directory.glob("*.safetensors")}
    if not shards:
        yield _missing(directory / "model.safetensors", "no weights", "error")
    index = directory / INDEX
    if not index.is_file():
        if len(shards) > 1:
            yield _missing(index, f"{len(shards)} shards need an index", "error")
        return
    named = set(read_json(index).get("weight_map", {}).values())
    for name in sorted(named ^ shards):
        what = "is named by the index but missing" if name in named else "is not named by the index"
        yield Finding(
            code="TC-463",
            where=str(directory / name),
            message=what,
            hint="fetch or write the checkpoint again",
        )
