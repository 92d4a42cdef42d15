"""Every request of a benchmark, for whoever wants to compute other figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.bench.measure import Sent
from toolchain.bench.records import Record
from toolchain.bench.work import LevelLoad
from toolchain.core.files import atomic_write_text


def write_records(path: Path, sent: Mapping[int, Sequence[Sent]], levels: Sequence[LevelLoad]) -> None:
    """JSON lines, one for each request, the unmeasured ones too: level, repeat (from 1), milliseconds."""
    lines = [
        json.dumps({"concurrency": level.concurrency, "rate": level.rate, "repeat": repeat, **value})
        for index, level in enumerate(levels)
        for repeat, item in enumerate(sent.get(index, ()), start=1)
        for value in _values(item)
    ]
    atomic_write_text(path, "".join(line + "\n" for line in lines))


def _values(sent: Sent) -> Iterator[dict[str, Any]]:
    for record in sorted(sent.measured.records, key=lambda record: record.started_s):
        yield {"measured": record.measured, **_milliseconds(record, sent.measured.start_s)}


def _milliseconds(record: Record, origin_s: float) -> dict[str, Any]:
    """``start_ms`` from the beginning of the window; ``pieces_ms`` from the start of the request."""
    start = record.started_s
    return {
        "start_ms": (start - origin_s) * 1000,
        "send_lag_ms": ((record.sent_s if record.sent_s is not None else start) - start) * 1000,
        "e2e_ms": (record.finished_s - start) * 1000,
        "pieces_ms": [round((at - start) * 1000, 3) for at in record.piece_s],
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "error": record.error,
    }
