"""Release numbers of TensorRT-LLM, compared as Python packaging does: 1.3.0rc20 < 1.3.0rc21 < 1.3.0."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from toolchain.core.errors import UsageError

_PATTERN = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:\.?(dev|a|b|rc)(\d+))?(?:\.?post(\d+))?(?:\+[\w.]+)?\Z")
_STAGES = {"dev": 0, "a": 1, "b": 2, "rc": 3, None: 4}


@dataclass(frozen=True, order=True)
class Version:
    """Orders by release, then stage (dev, a, b, rc, final), then the stage's number, then post releases."""

    key: tuple[int, ...]
    text: str = field(compare=False)

    def __str__(self) -> str:
        return self.text


def parse_version(text: str) -> Version:
    """``1.2.1``, ``1.3.0rc20``, ``v1.2.0.post1``; UsageError TC-106 for anything else."""
    match = _PATTERN.match(text.strip())
    if not match:
        raise UsageError(
            f"{text!r} is not a release number",
            hint="write it as the package index does, such as 1.2.1 or 1.3.0rc20",
            code="TC-106",
        )
    major, minor, patch, stage, number, post = match.groups()
    key = (int(major), int(minor), int(patch or 0), _STAGES[stage], int(number or 0), int(post or 0))
    return Version(key, text.strip().removeprefix("v"))
