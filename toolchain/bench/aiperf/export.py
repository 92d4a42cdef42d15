"""What aiperf leaves: one line of JSON for each request, and a summary with which those lines must agree.

Figures are computed here from the requests, by the same definitions as our own; aiperf's summary says most of them a
second time. A key that is not there, another unit, or figures that contradict each other are refused, so that a
changed format is named and never read as zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from toolchain.bench.records import Record
from toolchain.core.errors import FindingsError
from toolchain.core.files import read_json
from toolchain.core.findings import Finding

CODE = "TC-712"
SUMMARY = "profile_export_aiperf.json"
RECORDS = "profile_export.jsonl"
SCHEMA = "1."
"""Start of ``schema_version`` in the summary."""
TOLERANCE = 1e-3
"""Relative, between what is said twice: only rounding lies between them."""
TIMES = ("time_to_first_token", "request_latency")
FIELDS = (*TIMES, "inter_chunk_latency", "output_sequence_length")
UNITS = {**dict.fromkeys((*TIMES, "inter_chunk_latency"), "ms"), "output_sequence_length": "tokens"}
CLOCK = ("credit_issued_ns", "request_start_ns", "request_end_ns")
USAGE = "usage_completion_tokens"
"""The server's own count, where it gives one."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request that aiperf was given."""

    prompt_tokens: int
    output_tokens: int
    measured: bool


def read_export(directory: Path, asked: Mapping[str, Asked], *, open_loop: bool) -> tuple[Record, ...]:
    """The requests in ``directory``, in the order of their sending, in seconds since the first was sent.

    ``asked``: session id -> request, each of which must be there once. With ``open_loop`` latencies count from when a
    request was due, as in our own. FindingsError TC-712 with everything in which the files are not what aiperf 0.13.0
    writes.
    """
    absent = [name for name in (SUMMARY, RECORDS) if not (directory / name).is_file()]
    if absent:
        _refuse(directory, [f"{name} is not there" for name in absent])
    summary, lines = read_json(directory / SUMMARY), _lines(directory / RECORDS)
    problems = [*_bad_summary(summary), *_bad_lines(lines, asked)] or list(
        _contradictions(summary, lines, asked)
    )
    if problems:
        _refuse(directory, problems)
    start_ns = min(line["metadata"]["request_start_ns"] for line in lines)
    records = [_record(line, asked, start_ns, open_loop=open_loop) for line in lines]
    return tuple(sorted(records, key=lambda record: record.started_s))


def _refuse(directory: Path, problems: Sequence[str]) -> None:
    raise FindingsError(
        f"the files of aiperf in {directory} cannot be read",
        [Finding(code=CODE, where=str(directory), message=problem) for problem in problems[:20]],
        hint="its format may have changed: `make aiperf` installs the release that is read",
        code=CODE,
    )


def _lines(path: Path) -> list[Any]:
    found: list[Any] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            _refuse(path.parent, [f"{path.name} line {number} is not JSON: {error.msg}"])
    return found


def _bad_summary(summary: Any) -> Iterator[str]:
    if not isinstance(summary, dict):
        yield f"{SUMMARY} holds a {type(summary).__name__}, expected an object"
        return
    version = summary.get("schema_version")
    if not str(version).startswith(SCHEMA):
        yield f"{SUMMARY} has schema_version {version!r}, expected {SCHEMA}x"
    if summary.get("was_cancelled") is not False:
        yield f"{SUMMARY} has was_cancelled {summary.get('was_cancelled')!r}, expected false: it was interrupted"
    for name, unit in UNITS.items():
        found = summary.get(name)
        if found is not None and (not isinstance(found, dict) or found.get("unit") != unit):
            yield f"{SUMMARY}: {name} is {str(found)[:80]}, expected an object in {unit}"


def _bad_lines(lines: Sequence[Any], asked: Mapping[str, Asked]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        where = f"{RECORDS} line {number}"
        metadata = line.get("metadata") if isinstance(line, dict) else None
        if not isinstance(metadata, dict) or metadata.get("benchmark_phase") != "profiling":
            yield f"{where} has no metadata with benchmark_phase profiling"
        elif metadata.get("conversation_id") not in asked:
            yield f"{where} is of the unknown session {metadata.get('conversation_id')!r}"
        elif not all(_number(metadata.get(name)) for name in CLOCK):
            yield f"{where} has no {' or no '.join(CLOCK)}"
        elif _error(line) is None:
            for name in FIELDS:
                found = (line.get("metrics") or {}).get(name)
                if found is None and name == "inter_chunk_latency":
                    continue  # an answer in one piece
                if (
                    not isinstance(found, dict)
                    or found.get("unit") != UNITS[name]
                    or not _figure(found.get("value"))
                ):
                    yield f"{where}: {name} is {str(found)[:80]}, expected a value in {UNITS[name]}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figure(value: Any) -> bool:
    return all(map(_number, value)) if isinstance(value, list) else _number(value)


def _error(line: Mapping[str, Any]) -> str | None:
    error = line.get("error")
    if error:
        found = error if isinstance(error, dict) else {"message": error}
        words = " ".join(str(found[key]).strip() for key in ("code", "message") if found.get(key) is not None)
        return words or "failed without a message"
    return "cancelled" if line["metadata"].get("was_cancelled") else None


def _contradictions(
    summary: Mapping[str, Any], lines: Sequence[Any], asked: Mapping[str, Asked]
) -> Iterator[str]:
    sent = [line["metadata"]["conversation_id"] for line in lines]
    if len(sent) != len(set(sent)) or len(sent) != len(asked):
        yield f"{RECORDS} has {len(sent)} requests of {len(set(sent))} sessions, {len(asked)} of each were asked for"
        return
    good = [line["metrics"] for line in lines if _error(line) is None]
    count = (summary.get("request_count") or {}).get("avg", 0)
    if count != len(good):
        yield f"{SUMMARY}: request_count is {count}, {RECORDS} has {len(good)} that succeeded"
    for name in FIELDS:
        values = [value for each in good if name in each for value in _listed(each[name]["value"])]
        said = (summary.get(name) or {}).get("avg")
        if not values:
            continue
        mean = math.fsum(values) / len(values)
        if (
            said is None
            or not _number(said)
            or abs(said - mean) > TOLERANCE * max(abs(said), abs(mean), 1e-9)
        ):
            yield f"{name} is {said} on average in {SUMMARY}, {mean:.6g} in {RECORDS}"
    for each in good:
        first, whole = (each[name]["value"] for name in TIMES)
        rest = math.fsum(_listed(each.get("inter_chunk_latency", {"value": []})["value"]))
        if abs(first + rest - whole) > TOLERANCE * whole + 1e-3:
            yield f"time to first token {first} and gaps {rest:.6g} do not give the latency {whole}"
            return


def _listed(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def _record(line: Mapping[str, Any], asked: Mapping[str, Asked], start_ns: int, *, open_loop: bool) -> Record:
    metadata, metrics = line["metadata"], line.get("metrics") or {}
    request = asked[metadata["conversation_id"]]
    due_s, sent_s, ended_s = ((metadata[name] - start_ns) / 1e9 for name in CLOCK)
    known: dict[str, Any] = {
        "started_s": due_s if open_loop else sent_s,
        "sent_s": sent_s,
        "prompt_tokens": request.prompt_tokens,
        "measured": request.measured,
    }
    error = _error(line)
    if error is not None:
        return Record(finished_s=max(ended_s, sent_s), error=error, **known)
    gaps = _listed(metrics.get("inter_chunk_latency", {"value": []})["value"])
    arrivals = accumulate(gaps, initial=metrics["time_to_first_token"]["value"])
    pieces = tuple(sent_s + value / 1e3 for value in arrivals)
    # At most what was asked for, as in our own: broken characters split into more tokens than produced them.
    counted = metrics.get(USAGE, metrics["output_sequence_length"])["value"]
    tokens = min(int(counted), request.output_tokens)
    return Record(finished_s=pieces[-1], piece_s=pieces, output_tokens=tokens, **known)
