"""Verification of the written bytes."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
}
