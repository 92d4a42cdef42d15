"""Input and files."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-000": ("Unclassified failure", "Run again with --debug and report the traceback."),
    "TC-003": (
        "A JSON file cannot be parsed",
        "The file is damaged or was cut off. Fetch it again, or re-run the stage that writes it.",
    ),
    "TC-004": (
        "The output directory is occupied",
        "Nothing is overwritten without being asked for. Choose another --output, or pass --force.",
    ),
    "TC-005": (
        "Not enough disk space",
        "The plan says what will be written (checkpoint_bytes). Free space, or write to a larger disk.",
    ),
}
