"""The Hugging Face hub: config and headers for planning, snapshots for everything else. Never a pickle."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.models.headers import tensors_of_header
from toolchain.models.shards import has_all_shards
from toolchain.models.types import TensorInfo

T = TypeVar("T")

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
"""Config, tokenizer, chat template and licence."""
ALL_FILES = (*SMALL_FILES, "*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")


def is_hub_id(source: str) -> bool:
    """True for ``owner/name``: two parts, no leading dot or slash."""
    return bool(_HUB_ID.match(source)) and ".." not in source


def snapshot(
    source: str, *, revision: str | None, allow_download: bool = True, patterns: tuple[str, ...] = ALL_FILES
) -> Path:
    """Local directory with the files of ``source`` that match ``patterns``; from the cache when it is
    complete there.

    Raises ToolchainError TC-019 for whatever the hub or the network says.
    """
    from huggingface_hub import snapshot_download

    def download() -> str:
        return snapshot_download(
            source, revision=revision, allow_patterns=list(patterns), local_files_only=not allow_download
        )

    path = Path(_ask(source, download, allow_download=allow_download))
    if patterns == ALL_FILES and not has_all_shards(path):
        # Offline, the cache may hold what planning fetched: config and tokenizer.
        raise ToolchainError(
            f"{source} has no complete set of safetensors files{'' if allow_download else ' in the local cache'}",
            hint="fetch it once while online; a repository of pickles cannot be used",
            code="TC-019",
        )
    return path


def cached_snapshot(source: str, *, revision: str | None) -> Path | None:
    """The snapshot of ``source`` in the local cache with all of its weights, or None."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except Exception:  # noqa: BLE001 - whatever the reason, it is not in the cache; the caller asks the hub next
        return None
    return path if (path / "config.json").is_file() and has_all_shards(path) else None


def remote_tensors(source: str, *, revision: str | None) -> list[TensorInfo] | None:
    """Every tensor of a hub repository, by range requests for headers; None without safetensors."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    def fetch() -> Any:
        try:
            return HfApi().get_safetensors_metadata(source, revision=revision)
        except NotASafetensorsRepoError:
            return None

    metadata = _ask(source, fetch)
    if metadata is None:
        return None
    tensors: list[TensorInfo] = []
    for file in sorted(metadata.files_metadata):
        entries = metadata.files_metadata[file].tensors.items()
        header = {
            name: {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": list(item.data_offsets)}
            for name, item in entries
        }
        tensors += tensors_of_header(header, file=file)
    return tensors


def remote_file_names(source: str, *, revision: str | None) -> list[str]:
    """Names of all files of a hub repository."""
    from huggingface_hub import HfApi

    return _ask(source, lambda: HfApi().list_repo_files(source, revision=revision))


def _ask(source: str, question: Callable[[], T], *, allow_download: bool = True) -> T:
    """Run one hub call; what it raises becomes one ToolchainError without a traceback."""
    try:
        return question()
    except ToolchainError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        offline = not allow_download or is_offline()
        hint = (
            "the network is off (HF_HUB_OFFLINE, or cache only): give a directory, or fetch the model first"
            if offline
            else "check the path or the id, the network, and for a gated model the token (`hf auth login`)"
        )
        raise ToolchainError(
            f"{source} is no directory here, and cannot be read from the hub: {type(error).__name__}: {reason}",
            hint=hint,
            code="TC-019",
        ) from error


def is_offline() -> bool:
    """True when HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def refuse_source(source: str) -> UsageError:
    """The error for something that is neither a directory nor a hub id."""
    return UsageError(
        f"{source!r} is no directory on this machine and no hub id (owner/name)",
        hint="check the path; `toolchain demo` makes a small model to start with",
        code="TC-010",
    )
