"""The local runtime and evaluation."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-501": ("Bad sampling parameters", "The message lists each parameter with the range that was expected."),
}
