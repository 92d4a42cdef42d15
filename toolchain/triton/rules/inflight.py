"""The ``inflight_batcher_llm`` layout: paths of the backend's model, and its batches against the engine's limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import read_json
from toolchain.core.findings import Finding
from toolchain.triton.rules.model import PLACEHOLDER, Model
from toolchain.triton.rules.rule import Rule

BACKEND = "tensorrtllm"
AGAIN = "render the repository again"
NEEDED = Rule(
    code="TC-602",
    says="gpt_model_type or gpt_model_path of the TensorRT-LLM backend is missing",
    server="the backend refuses",
    hint=AGAIN,
)
BUNDLE = Rule(
    code="TC-610",
    says="gpt_model_path or tokenizer_dir names nothing on this machine",
    server="backend or model.py refuses",
    hint=AGAIN,
)
NOT_BUILT = Rule(
    code="TC-610",
    severity="warning",
    says="gpt_model_path is there and holds no engine yet",
    server="the backend refuses",
)
BATCH = Rule(
    code="TC-656",
    says="max_batch_size, preferred_batch_size or max_beam_width above what the TensorRT engine was built for",
    server="the backend refuses, or requests fail",
    hint="lower it, or build the engine for it",
)
RANKS = Rule(
    code="TC-604",
    says="an engine of several ranks without the file of each",
    server="the backend refuses",
    hint="build it again, or copy all rank*.engine",
)
RULES = (NEEDED, BUNDLE, NOT_BUILT, BATCH, RANKS)


def lint_inflight(model: Model, *, check_paths: bool) -> Iterator[Finding]:
    """Findings of a model of the TensorRT-LLM backend; an engine that is not there yet is a warning."""
    missing = [name for name in ("gpt_model_type", "gpt_model_path") if name not in model.config.parameters]
    for name in missing:
        yield NEEDED.found(model.file, f"parameter {name} is missing")
    named = model.parameter("gpt_model_path")
    if missing or not check_paths or PLACEHOLDER.search(named):
        return
    engine, where = Path(named), model.at_entry("parameters", "gpt_model_path")
    if not engine.parent.is_dir():
        yield BUNDLE.found(where, f"gpt_model_path {engine}: its bundle is gone")
    elif not (engine / "config.json").is_file():
        message = f"gpt_model_path {engine} holds no engine yet"
        yield NOT_BUILT.found(
            where, message, f"trtllm-build makes it: see {engine.parent / 'trtllm_build.json'}"
        )
    else:
        yield from _engine(model, engine, where)


def lint_tokenizer(model: Model) -> Iterator[Finding]:
    """The directory of the tokenizer exists, where a model names one by an absolute path."""
    named = model.parameter("tokenizer_dir")
    if named.startswith("/") and not Path(named).is_dir():
        where = model.at_entry("parameters", "tokenizer_dir")
        yield BUNDLE.found(where, f"tokenizer_dir {named} does not exist")


def _engine(model: Model, engine: Path, where: str) -> Iterator[Finding]:
    try:
        config = read_json(engine / "config.json")
    except (ToolchainError, OSError) as error:
        yield BUNDLE.found(where, f"{engine / 'config.json'} cannot be read: {error}")
        return
    build = _mapping(config, "build_config")
    largest = build.get("max_batch_size")
    if isinstance(largest, int):
        sizes = {"max_batch_size": [model.config.max_batch_size]}
        sizes["dynamic_batching"] = list(model.config.dynamic_batching.preferred_batch_size)
        for field, given in sizes.items():
            if given and max(given) > largest:
                message = f"{field} {max(given)}, the engine was built for batches of {largest}"
                yield BATCH.found(model.where(field), message)
    beams, widest = model.parameter("max_beam_width"), build.get("max_beam_width")
    if isinstance(widest, int) and beams.isdigit() and int(beams) > widest:
        message = f"max_beam_width {beams}, the engine was built for {widest}"
        yield BATCH.found(model.at_entry("parameters", "max_beam_width"), message)
    world = _mapping(_mapping(config, "pretrained_config"), "mapping").get("world_size")
    if isinstance(world, int) and 0 < world <= 4096:
        missing = [rank for rank in range(world) if not (engine / f"rank{rank}.engine").is_file()]
        if missing and any(engine.glob("rank*.engine")):
            yield RANKS.found(where, f"{engine} lacks rank{missing[0]}.engine of {world} ranks")


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}
