"""Building engine bundles."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-401": (
        "The checkpoint has no plan.json",
        "A build takes its limits and parallelism from the plan of the checkpoint. Quantize with this toolchain, or "
        "give the limits as options.",
    ),
    "TC-402": (
        "The checkpoint failed its audit",
        "Nothing is built from a checkpoint that `toolchain verify` rejects. Each finding says what is wrong.",
    ),
    "TC-403": (
        "The target cannot build this engine",
        "`toolchain support` shows which formats run on which GPU and release.",
    ),
}
