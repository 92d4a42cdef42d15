"""Planning."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-101": ("Unknown format", "`toolchain list formats` shows what exists."),
    "TC-102": ("Unknown GPU", "`toolchain list gpus` shows what exists."),
}
