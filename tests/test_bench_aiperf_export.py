"""aiperf's recorded files give its own figures, and what changed in them is refused.

The recordings in tests/data were made with the release of requirements-aiperf.lock: of tritonserver 2.51 with the demo
engine (one prompt too long), and of a server that sends a chat's four chunks of two tokens each 20 ms apart.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolchain.bench.aiperf.export import RECORDS, SUMMARY, Asked, read_export
from toolchain.bench.aiperf.installed import READ_VERSION
from toolchain.bench.records import Measured
from toolchain.bench.settings import Settings
from toolchain.bench.statistics import summary
from toolchain.core.errors import FindingsError

DATA = Path(__file__).parent / "data" / f"aiperf-{READ_VERSION}"


def asked(count: int) -> dict[str, Asked]:
    return {f"{index:06d}": Asked(prompt_tokens=12, output_tokens=4, measured=True) for index in range(count)}


@pytest.mark.parametrize(("name", "count", "errors"), [("triton", 6, 1), ("chat", 3, 0)])
def test_recorded_requests_give_the_figures_of_aiperfs_own_summary(
    name: str, count: int, errors: int
) -> None:
    records = read_export(DATA / name, asked(count), open_loop=False)
    said = json.loads((DATA / name / SUMMARY).read_text())
    end_s = max(record.finished_s for record in records)
    found = summary([Measured(records=records, start_s=0.0, end_s=end_s)], settings=Settings(), gpus=None)
    assert (found["requests"], found["errors"]) == (count, errors)
    for ours, theirs in (
        ("ttft_ms", "time_to_first_token"),
        ("itl_ms", "inter_chunk_latency"),
        ("e2e_ms", "request_latency"),
    ):
        for mine, its in (
            ("p50", "p50"),
            ("p90", "p90"),
            ("p99", "p99"),
            ("mean", "avg"),
            ("count", "count"),
        ):
            assert getattr(found[ours], mine) == pytest.approx(said[theirs][its], rel=1e-5), (ours, mine)
    if name == "triton":  # the same token counts: the time per token is what it calls inter token latency
        assert found["tpot_ms"].mean == pytest.approx(said["inter_token_latency"]["avg"], rel=1e-5)
        assert found["output_tokens"] == said["total_osl"]["avg"]
    (message,) = found["error_messages"] or {"": 0}
    assert ("max_seq_len" in message) == bool(errors)


def test_the_servers_own_token_count_goes_before_that_of_the_tokenizer() -> None:
    said = json.loads((DATA / "chat" / SUMMARY).read_text())
    records = read_export(DATA / "chat", asked(3), open_loop=False)
    assert said["output_sequence_length"]["avg"] == 8.0  # of four chunks, each a word of two tokens
    assert [record.output_tokens for record in records] == [4, 4, 4]


def test_in_an_open_loop_latency_counts_from_when_a_request_was_due() -> None:
    sent, due = (read_export(DATA / "triton", asked(6), open_loop=on) for on in (False, True))
    lines = [json.loads(line) for line in (DATA / "triton" / RECORDS).read_text().splitlines()]
    waits = sorted(
        (line["metadata"]["request_start_ns"] - line["metadata"]["credit_issued_ns"]) / 1e9 for line in lines
    )
    assert sorted((one.sent_s or 0.0) - one.started_s for one in due) == pytest.approx(waits, abs=1e-9)
    assert all(one.sent_s == one.started_s for one in sent)


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "triton", tmp_path / "artifacts"))


def change(path: Path, edit: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def change_lines(path: Path, edit: Callable[[Any], None]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if not line.get("error"):
            edit(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda value: value.update(schema_version="2.0"), "schema_version '2.0', expected 1.x"),
        (lambda value: value.update(was_cancelled=True), "it was interrupted"),
        (lambda value: value["time_to_first_token"].update(unit="s"), "expected an object in ms"),
        (lambda value: value["time_to_first_token"].update(avg=1.0), "time_to_first_token is 1.0 on average"),
        (lambda value: value.pop("inter_chunk_latency"), "inter_chunk_latency is None on average"),
        (lambda value: value["request_count"].update(avg=6.0), "request_count is 6.0"),
    ],
)
def test_a_summary_that_changed_is_refused(edit: Callable[[Any], None], words: str, artifacts: Path) -> None:
    change(artifacts / SUMMARY, edit)
    assert_refused(artifacts, words)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda line: line["metrics"].pop("time_to_first_token"), "time_to_first_token is None"),
        (lambda line: line["metrics"]["request_latency"].update(unit="s"), "expected a value in ms"),
        (lambda line: line["metrics"]["request_latency"].update(value=None), "expected a value in ms"),
        (lambda line: line["metrics"]["inter_chunk_latency"].update(value=[1.0]), "inter_chunk_latency is"),
        (lambda line: line["metadata"].update(conversation_id="x"), "unknown session 'x'"),
        (
            lambda line: line["metadata"].pop("request_start_ns"),
            "has no credit_issued_ns or no request_start_ns",
        ),
        (lambda line: line.pop("metadata"), "has no metadata"),
    ],
)
def test_records_that_changed_are_refused(edit: Callable[[Any], None], words: str, artifacts: Path) -> None:
    change_lines(artifacts / RECORDS, edit)
    assert_refused(artifacts, words)


def test_missing_and_damaged_files_are_refused(artifacts: Path) -> None:
    assert_refused(artifacts, "6 requests of 6 sessions, 7 of each were asked for", count=7)
    text = (artifacts / RECORDS).read_text()
    (artifacts / RECORDS).write_text(text[: len(text) // 2])
    assert_refused(artifacts, "is not JSON")
    (artifacts / RECORDS).unlink()
    assert_refused(artifacts, f"{RECORDS} is not there")


def assert_refused(artifacts: Path, words: str, *, count: int = 6) -> None:
    with pytest.raises(FindingsError) as refused:
        read_export(artifacts, asked(count), open_loop=False)
    assert refused.value.code == "TC-712"
    assert any(words in finding.message for finding in refused.value.findings), refused.value.findings
