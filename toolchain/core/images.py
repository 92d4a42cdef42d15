"""Container images by name: the only reader of ``versions.env``, the only place where their tags stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).with_name("versions.env")


@dataclass(frozen=True, kw_only=True)
class Image:
    reference: str
    """``repository:tag``."""
    digest: str = ""
    """``sha256:...``; empty: not known."""

    @property
    def pinned(self) -> str:
        """``repository:tag@digest``, or without the digest where that is not known. Runtimes go by the digest."""
        return f"{self.reference}@{self.digest}" if self.digest else self.reference

    @property
    def repository(self) -> str:
        return self.reference.rsplit(":", 1)[0]


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The variables of ``versions.env``."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {pair[0]: pair[1] for pair in pairs}


def get_image(name: str) -> Image:
    """The image that ``versions.env`` calls ``<name>_IMAGE``. KeyError for a name that is not there: a defect."""
    found = versions()
    return Image(reference=found[f"{name}_IMAGE"], digest=found.get(f"{name}_DIGEST", ""))


def trtllm_image(version: str) -> Image:
    """TensorRT-LLM's release image of ``version``: its tag is the release, so every release has a name here."""
    known = get_image("TRTLLM")
    if version == versions()["TRTLLM_VERSION"]:
        return known
    return Image(reference=f"{known.repository}:{version}")


def triton_image(version: str) -> Image | None:
    """The Triton image that carries TensorRT-LLM ``version``; None where NVIDIA's matrix lists none."""
    found = versions()
    if version == found["TRITON_TRTLLM_VERSION"]:
        return get_image("TRITON_TRTLLM")
    name = f"TRITON_TRTLLM_{version.replace('.', '_')}"
    return get_image(name) if f"{name}_IMAGE" in found else None
