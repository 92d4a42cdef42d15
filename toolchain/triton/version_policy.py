"""Which versions of a model a server keeps loaded: ``latest:N``, ``all``, or numbers such as ``1,3``."""

from __future__ import annotations

import re
from typing import Any

from toolchain.core.errors import UsageError

DEFAULT = "latest:1"
"""Triton's own default; written out, so that config.pbtxt says what a rolling update relies on."""


def set_version_policy(config: Any, text: str) -> None:
    """Set ``version_policy`` of an ``inference.ModelConfig``. UsageError TC-613 for a text of another form."""
    if text == "all":
        config.version_policy.all.SetInParent()
    elif match := re.fullmatch(r"latest:([1-9]\d*)", text):
        config.version_policy.latest.num_versions = int(match.group(1))
    elif re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        config.version_policy.specific.versions.extend(sorted({int(part) for part in text.split(",")}))
    else:
        raise UsageError(
            f"versions {text!r}; expected latest:N, all, or numbers such as 1,3",
            hint="latest:1 is what a rolling update needs: the new version takes over, the old one is unloaded",
            code="TC-613",
        )


def serves_only_latest(config: Any) -> bool:
    """Whether a newer version takes the place of the older ones: ``latest`` with one version, or no policy."""
    kind = config.version_policy.WhichOneof("policy_choice")
    return kind is None or (kind == "latest" and config.version_policy.latest.num_versions in (0, 1))
