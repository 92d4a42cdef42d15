"""What was measured: the model behind an engine or a checkpoint, how it is stored, and how large it is.

Two results compare only when the model is the same; its size belongs beside its speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.files import read_json, sha256_file

LOCAL = "local"


def describe_engine(path: Path | None) -> dict[str, Any] | None:
    """The engine or plain checkpoint in ``path``; None without one, or where it is neither.

    ``model``: identity of the *source* model (config.json and the names, dtypes, shapes and files of its tensors), the
    same for a checkpoint and every engine made from it. ``checkpoint_bytes``: safetensors files with their headers.
    ``kv_bytes_per_token``: of all layers and ranks, as the target holds it in memory. None: not known.
    """
    if path is None or not path.is_dir():
        return None
    manifest = read_json(path / "engine.json") if (path / "engine.json").is_file() else None
    checkpoint = path / "checkpoint" if manifest is not None else path
    if not (checkpoint / "config.json").is_file():
        return None
    found: dict[str, Any] = {"name": path.absolute().name, "manifest_sha256": None, "format": "source"}
    if isinstance(manifest, dict):
        model = manifest.get("model") or {}
        found |= {
            "manifest_sha256": sha256_file(path / "engine.json"),
            "format": manifest.get("format"),
            "target": manifest.get("target"),
            "parallel": manifest.get("parallel"),
            "model": model.get("identity"),
            "architecture": model.get("architecture"),
        }
    sizes = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    kv_cache = manifest.get("kv_cache", "none") if isinstance(manifest, dict) else "none"
    found |= {"kv_cache": kv_cache, "checkpoint_bytes": sum(sizes) or None}
    gpu_name = manifest.get("gpu") if isinstance(manifest, dict) else None
    return _with_model(found, checkpoint, str(gpu_name or "cpu"))


def _with_model(found: dict[str, Any], checkpoint: Path, gpu_name: str) -> dict[str, Any]:
    """What only the headers of the tensors tell. A model that planning does not know has none of it."""
    from toolchain.core.gpus import get_gpu
    from toolchain.models import model_identity, read_model
    from toolchain.plan.memory import held_kv_cache, kv_bytes_per_token
    from toolchain.plan.types import Serving
    from toolchain.targets import get_target

    try:
        info = read_model(str(checkpoint), allow_download=False)
        target, gpu = get_target(found.get("target") or LOCAL), get_gpu(gpu_name)
        held = held_kv_cache(target, found["kv_cache"], gpu.sm)
        one = Serving(max_batch_size=1, max_seq_len=1)
        per_token = kv_bytes_per_token(info, held, one, per_head=target.emulates)
    except ToolchainError:
        return found
    if found["manifest_sha256"] is None:
        found |= {"model": model_identity(info), "architecture": info.architecture}
    return {**found, "kv_bytes_per_token": per_token}
