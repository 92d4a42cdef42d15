"""Engine bundles: what a target needs beside the checkpoint, and the manifest that makes a directory an engine."""

from __future__ import annotations

from toolchain.build.bundle import write_manifest, write_target_files

__all__ = ["write_manifest", "write_target_files"]
