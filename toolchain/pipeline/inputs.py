"""What an engine is made of, as hashes: a changed byte of the model or of a text is noticed, whatever its name."""

from __future__ import annotations

from pathlib import Path

from toolchain.core.errors import ToolchainError
from toolchain.core.files import atomic_write_json, hash_tree, read_json, sha256_file, sha256_json

CALIBRATION_FILE, EVALUATION_FILE = "calibration.jsonl", "evaluation.jsonl"
"""A model directory may carry text of its own under these names."""
READ = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
"""What loading and exporting read: weights, configs, tokenizers, templates, remote code."""
REMEMBERED_BYTES = 64 * 1024**2
"""The hash of a file at least this large is remembered by its size and time of change."""


def model_files(directory: Path, memory: Path | None) -> dict[str, str]:
    """File name -> SHA-256 of every file of the model that decides what is written.

    ``memory``: JSON file that keeps the hashes of large files between runs; hashing 100 GB takes a minute or more.
    """
    known = _read_memory(memory) if memory else {}
    hashes: dict[str, str] = {}
    kept: dict[str, list[object]] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix not in READ or path.name.startswith(".") or not path.is_file():
            continue
        stat = path.stat()
        if stat.st_size < REMEMBERED_BYTES:
            hashes[path.name] = sha256_file(path)
            continue
        key = [str(path), stat.st_size, stat.st_mtime_ns]
        old = known.get(path.name)
        hashes[path.name] = str(old[-1]) if old and old[:-1] == key else sha256_file(path)
        kept[path.name] = [*key, hashes[path.name]]
    if memory and kept != known:
        atomic_write_json(memory, kept)
    return hashes


def _read_memory(memory: Path) -> dict[str, list[object]]:
    if not memory.is_file():
        return {}
    try:
        value = read_json(memory)
    except ToolchainError:
        return {}
    return value if isinstance(value, dict) else {}


def texts_identity(paths: list[Path]) -> str | None:
    """``text_identity`` of the only one, or one hash over those of several."""
    found = [text_identity(path) for path in paths]
    return found[0] if len(found) == 1 else sha256_json(found)


def text_identity(path: Path | None) -> str | None:
    """SHA-256 of a text file, or over those of a directory of texts; None without one (a hub data set)."""
    if path is None:
        return None
    path = path.expanduser()
    if path.is_file():
        return sha256_file(path)
    return sha256_json(hash_tree(path)) if path.is_dir() else None
