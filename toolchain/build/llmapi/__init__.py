"""TensorRT-LLM's LLM API by release: its arguments as data, the check of what is passed to it, its commands."""

from __future__ import annotations

from toolchain.build.llmapi.check import argument_findings, require_arguments
from toolchain.build.llmapi.records import Record, find_record, read_records

__all__ = ["Record", "argument_findings", "find_record", "read_records", "require_arguments"]
