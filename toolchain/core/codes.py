"""The catalogue of numbered errors and findings, for ``toolchain explain CODE``. One line title, then what to do.

Ranges: 0xx input and files, 1xx planning, 2xx quantization, 3xx verification, 4xx build, 5xx runtime, 6xx Triton and
serving, 7xx benchmarks.
"""

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
    "TC-101": ("Unknown format", "`toolchain list formats` shows what exists."),
    "TC-102": ("Unknown GPU", "`toolchain list gpus` shows what exists."),
    "TC-501": ("Bad sampling parameters", "The message lists each parameter with the range that was expected."),
}
