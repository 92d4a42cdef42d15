"""What is known of the model that an engine was made of: its name on the hub and what its own card says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolchain.models.hub import is_hub_id

_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+/?\Z")
"""Directory of a repository in huggingface_hub's cache."""
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    name: str
    """Hub id, or the name of the directory."""
    hub_id: str | None = None
    license: str | None = None
    """Identifier of the hub: ``apache-2.0``, ``mit``, ``other`` ..."""
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None
    language: tuple[str, ...] = ()

    @property
    def license_text(self) -> str | None:
        """The licence as people call it."""
        return self.license_name if self.license in (None, "other") else self.license


def read_source(source: str, *, base_model: str | None = None, license_id: str | None = None) -> SourceFacts:
    """Facts of ``source``, a directory or hub id, from files on this machine: nothing is fetched.

    ``base_model`` and ``license_id`` are what the user states, and win.
    """
    hub_id = base_model or _hub_id(source)
    card = _front_matter(_card(source, hub_id))
    language = card.get("language") or ()
    return SourceFacts(
        name=hub_id or Path(source).name,
        hub_id=hub_id,
        license=license_id or _text(card.get("license")),
        license_name=None if license_id else _text(card.get("license_name")),
        license_link=None if license_id else _text(card.get("license_link")),
        pipeline_tag=_text(card.get("pipeline_tag")),
        language=tuple(map(str, [language] if isinstance(language, str) else language)),
    )


def _hub_id(source: str) -> str | None:
    if Path(source).is_absolute():
        cached = _SNAPSHOT.search(source)
        return "/".join(cached.groups()) if cached else None
    return source if is_hub_id(source) else None


def _card(source: str, hub_id: str | None) -> Path | None:
    """README.md of the model: in its directory, or in the cache of the hub."""
    from huggingface_hub import try_to_load_from_cache

    own = Path(source) / "README.md"
    if own.is_file():
        return own
    cached = try_to_load_from_cache(hub_id, "README.md") if hub_id else None
    return Path(cached) if isinstance(cached, str) else None


def _front_matter(card: Path | None) -> dict[str, Any]:
    """The YAML block at the head of a model card; empty where there is none or it is no YAML."""
    found = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card else None
    try:
        value = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
