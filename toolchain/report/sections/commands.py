"""How to do it again."""

from __future__ import annotations

import shlex

from toolchain.report.blocks import Block, Code, Facts, Section, missing
from toolchain.report.documents import Document, number, part, text, texts
from toolchain.report.inputs import EngineFiles

NAMES = ("toolchain", "nvidia-modelopt", "torch", "transformers", "python")
"""Versions that come first; others follow by name."""


def section(files: EngineFiles) -> Section:
    blocks: list[Block] = []
    if command := texts(files.manifest.get("command")):
        blocks.append(Code(label="This engine was made by", lines=(shlex.join(command),)))
    else:
        blocks.append(missing("The command was", "engine.json, which names it, is not there"))
    blocks.append(Code(label="Check it, and measure it again", lines=tuple(_again(files))))
    return Section(id="commands", short="Commands", title="Commands to reproduce", blocks=tuple(blocks))


def _again(files: EngineFiles) -> list[str]:
    source = text(files.plan, "model") or text(files.metrics, "baseline")
    against = ["--against", source] if source else []
    lines = [["toolchain", "verify", files.where, *against]]
    evaluate = ["toolchain", "evaluate", files.where, *(["--baseline", source] if source else [])]
    data = part(files.metrics, "data")
    for option, key in (("--data", "source"), ("--max-tokens", "tokens"), ("--window", "window")):
        evaluate += [option, text(data, key)] if text(data, key) else []
    if (stride := number(data, "stride")) is not None:
        evaluate += ["--stride", f"{stride:g}"]
    lines += [evaluate, ["toolchain", "bench", files.where], ["toolchain", "report", files.where]]
    return [shlex.join(line) for line in lines]


def versions(files: EngineFiles) -> Section:
    found = part(files.manifest, "versions") or part(files.quantize, "versions")
    order = sorted(found, key=lambda name: (NAMES.index(name) if name in NAMES else len(NAMES), name))
    items = [(name, text(found, name)) for name in order]
    extra = [
        ("git commit", text(files.manifest, "git_commit")),
        ("made", text(files.manifest, "created")),
        ("engine.json SHA-256", files.manifest_sha256 or ""),
        ("model identity", _identity(files.plan)),
    ]
    items += [(name, value) for name, value in extra if value]
    blocks: tuple[Block, ...] = (
        (Facts(items=tuple(items)),) if items else (missing("Versions were", "no manifest"),)
    )
    return Section(id="versions", title="Versions", blocks=blocks)


def _identity(plan: Document) -> str:
    return text(plan, "model_identity")
