"""The files of target ``trtllm`` beside the checkpoint: arguments, lock of versions, commands, the warm-up script."""

from __future__ import annotations

from pathlib import Path

from toolchain.build.llmapi.commands import commands, document, markdown
from toolchain.build.trtllm import llm_args, render_yaml, version_lock
from toolchain.core.files import atomic_write_json, atomic_write_text
from toolchain.families import Family
from toolchain.plan.types import Plan

SCRIPT = "warmup.py"
FILES = ("llm_args.yaml", "versions.lock.json", "commands.json", "commands.md", SCRIPT)
WARM = ("warmup.json", "warmup.log")
"""What a warm-up leaves: of another bundle it says nothing."""
DATA = Path(__file__).parent / "data"


def write_trtllm_files(directory: Path, plan: Plan, family: Family, *, is_moe: bool, name: str) -> list[Path]:
    """Write ``FILES`` into ``directory``. FindingsError TC-404 before anything is written where the release does not
    take the arguments. ``name``: of the engine."""
    arguments, reasons = llm_args(plan, family, is_moe=is_moe)
    lock = version_lock(plan)
    model = name if Path(plan.model).is_absolute() else plan.model
    found = commands(plan, name=model)
    image, version = lock["image"], plan.target_version
    atomic_write_text(directory / "llm_args.yaml", render_yaml(arguments, reasons))
    atomic_write_json(directory / "versions.lock.json", lock)
    atomic_write_json(directory / "commands.json", document(found, image, version))
    atomic_write_text(directory / "commands.md", markdown(found, image, version))
    atomic_write_text(directory / SCRIPT, (DATA / SCRIPT).read_text(encoding="utf-8"))
    return [directory / item for item in FILES]


def remove_trtllm_files(directory: Path) -> None:
    for name in (*FILES, *WARM):
        (directory / name).unlink(missing_ok=True)
