"""Reports of trtllm-bench: figures as its source computes them from requests, units checked, nothing half-written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran
from tests.engine_dirs import write_engine
from toolchain.bench.trtllm import import_report
from toolchain.core.errors import FindingsError
from toolchain.report.inputs import read_engine
from toolchain.report.sections.speed import section

REQUESTS = [(0.0, 0.05, 1.05), (0.1, 0.17, 1.37), (0.2, 0.29, 1.69), (1.1, 1.15, 2.35)]
"""(sent, first token, last token) in seconds of each request; 100 tokens of prompt, 21 of answer."""
PROMPT, ANSWER = 100, 21


def percentiles(values: list[float], scale: float = 1.0) -> dict[str, float]:
    """``PercentileStats.from_iterable`` of tensorrt_llm/bench/dataclasses/statistics.py: order statistics."""
    ordered = sorted(value * scale for value in values)
    found = {f"p{p}": ordered[int(len(ordered) * p / 100)] for p in (50, 90, 95, 99)}
    return {
        **found,
        "minimum": ordered[0],
        "maximum": ordered[-1],
        "average": math.fsum(ordered) / len(ordered),
    }


def report(**changes: Any) -> dict[str, Any]:
    """What ``ReportUtility.get_statistics_dict`` makes of REQUESTS on two GPUs."""
    seconds = max(end for _, _, end in REQUESTS) - min(start for start, _, _ in REQUESTS)
    latencies = [end - start for start, _, end in REQUESTS]
    ttft = [first - start for start, first, _ in REQUESTS]
    tpot = [(end - first) / (ANSWER - 1) for _, first, end in REQUESTS]
    rate = ANSWER * len(REQUESTS) / seconds
    return {
        "engine": {
            "model": "m", "model_path": "checkpoint", "engine_dir": "None", "version": "1.2.1", "backend": "Pytorch",
            "dtype": "bfloat16", "kv_cache_dtype": "FP8", "quantization": "FP8",
        },
        "machine": {"name": "NVIDIA H100", "memory.total": 79.6, "clocks.mem": 2.6},
        "world_info": {
            "tp_size": 2, "pp_size": 1, "ep_size": 1, "world_size": 2, "max_batch_size": 8, "max_num_tokens": 8192,
            "scheduling_policy": "GUARANTEED_NO_EVICT", "kv_cache_percentage": 0.85, "issue_rate": 3.0,
        },
        "request_info": {
            "num_requests": len(REQUESTS), "avg_num_concurrent_requests": sum(latencies) / seconds,
            "avg_input_length": float(PROMPT), "avg_output_length": float(ANSWER),
        },
        "performance": {
            "total_latency_ms": seconds * 1e3, "avg_request_latency_ms": sum(latencies) / len(latencies) * 1e3,
            "request_throughput_req_s": len(REQUESTS) / seconds, "system_output_throughput_tok_s": rate,
            "system_total_throughput_tok_s": rate + PROMPT * len(REQUESTS) / seconds,
            "output_throughput_per_user_tok_s": 17.0, "output_throughput_per_gpu_tok_s": rate / 2,
            "request_latency_percentiles_ms": percentiles(latencies, 1e3),
        },
        "streaming_metrics": {
            "token_output_speed_tok_s": 20.0, "avg_ttft_ms": sum(ttft) / len(ttft) * 1e3,
            "avg_tpot_ms": sum(tpot) / len(tpot) * 1e3, "tpot_percentiles": percentiles(tpot, 1e3),
            "ttft_percentiles": percentiles(ttft, 1e3), "gen_tps_percentiles": percentiles([1 / x for x in tpot]),
        },
        "dataset": {"isl": 100},
        **changes,
    }  # fmt: skip


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    directory = write_engine(tmp_path / "engine", target="trtllm")
    manifest = json.loads((directory / "engine.json").read_text())
    (directory / "engine.json").write_text(json.dumps({**manifest, "parallel": {"tp": 2, "ep": 1, "pp": 1}}))
    return directory


def write(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(value))
    return path


def test_a_report_becomes_a_result(engine: Path, tmp_path: Path, toolchain: Callable[..., Ran]) -> None:
    path = write(tmp_path, report())
    ran = toolchain("bench", engine, "--import", path, "--json")
    assert ran.status == 0, ran.err
    (level,) = ran.json["levels"]
    assert level["requests"] == 4 and level["errors"] == 0 and level["concurrency"] == 2
    assert level["duration_s"] == pytest.approx(2.35)
    assert level["prompt_tokens"] == 400 and level["output_tokens"] == 84
    assert level["output_tokens_per_s"] == pytest.approx(84 / 2.35)
    assert level["requests_per_s"] == pytest.approx(4 / 2.35)
    assert level["ttft_ms"]["p50"] == pytest.approx(70.0) and level["ttft_ms"]["mean"] == pytest.approx(65.0)
    assert level["tpot_ms"]["p50"] == pytest.approx(60.0) and level["itl_ms"] is None
    assert level["e2e_ms"]["p99"] == pytest.approx(1490.0) and level["e2e_ms"]["count"] == 4
    assert ran.json["environment"]["gpus"] == ["NVIDIA H100, 80 GiB"] * 2
    assert ran.json["environment"]["server"] == {"name": "trtllm-bench", "version": "1.2.1"}
    (written,) = (engine / "bench").glob("*.json")
    assert json.loads(written.read_text()) == ran.json
    # The report page reads it like any other.
    assert "trtllm-bench" in str(section(read_engine(engine)))


def test_without_streaming_there_are_no_first_tokens(engine: Path, tmp_path: Path) -> None:
    value = report()
    del value["streaming_metrics"]
    (level,) = import_report(
        write(tmp_path, value), engine_dir=engine, known_releases=("1.2.1",)
    ).result.levels
    assert level.ttft_ms is None and level.tpot_ms is None and level.e2e_ms is not None


def changed(section_name: str, **values: Any) -> dict[str, Any]:
    value = report()
    return {**value, section_name: {**value[section_name], **values}}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (changed("performance", total_latency_ms=2.35), "request_throughput_req_s is"),
        (
            changed("performance", request_latency_percentiles_ms=percentiles([1.0, 1.2], 1e9)),
            "percentiles_ms.average",
        ),
        (
            changed("streaming_metrics", ttft_percentiles=percentiles([0.05, 0.07])),
            "ttft_percentiles.average",
        ),
        (
            changed("performance", output_throughput_per_gpu_tok_s=84 / 2.35),
            "output_throughput_per_gpu_tok_s",
        ),
        (changed("request_info", avg_output_length=42.0), "system_output_throughput_tok_s"),
        (changed("request_info", num_requests=0), "nothing was measured"),
        (changed("engine", version="1.1.0"), "TensorRT-LLM is 1.1.0 in the report, 1.2.1 in the engine"),
        (changed("engine", quantization="NVFP4"), "quantization is NVFP4"),
        (changed("world_info", tp_size=4), "tp is 4"),
        (report(performance={"total_latency_ms": 1.0}), "performance has no avg_request_latency_ms"),
        (report(request_info=None), "request_info has no num_requests"),
        (changed("streaming_metrics", tpot_percentiles={"p50": 1.0}), "has no p90, p99, average"),
    ],
)
def test_a_report_that_does_not_fit_is_refused(
    value: dict[str, Any], words: str, engine: Path, tmp_path: Path, toolchain: Callable[..., Ran]
) -> None:
    path = write(tmp_path, value)
    with pytest.raises(FindingsError) as refused:
        import_report(path, engine_dir=engine, known_releases=("1.2.1",))
    assert refused.value.code == "TC-705" and any(words in item.message for item in refused.value.findings), [
        str(item) for item in refused.value.findings
    ]
    assert toolchain("bench", engine, "--import", path, "--json").status == 1
    assert not (engine / "bench").exists()


def test_a_release_whose_reports_nobody_has_read_is_said(
    engine: Path, tmp_path: Path, toolchain: Callable[..., Ran]
) -> None:
    manifest = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**manifest, "target_version": "1.4.0rc1"}))
    ran = toolchain("bench", engine, "--import", write(tmp_path, changed("engine", version="1.4.0rc1")))
    assert ran.status == 0 and "have not been seen" in ran.err


@pytest.mark.parametrize("text", ["[]", "{", "nonsense"])
def test_what_is_no_report_is_refused(
    text: str, engine: Path, tmp_path: Path, toolchain: Callable[..., Ran]
) -> None:
    (tmp_path / "report.json").write_text(text)
    ran = toolchain("bench", engine, "--import", tmp_path / "report.json", "--json")
    assert ran.status in (1, 2) and ran.json["error"]["message"]
    assert toolchain("bench", engine, "--import", tmp_path / "absent.json", "--json").status in (1, 2)


def test_a_server_by_address_has_no_engine_to_import_into(
    tmp_path: Path, toolchain: Callable[..., Ran]
) -> None:
    path = write(tmp_path, report())
    ran = toolchain("bench", "127.0.0.1:8001", "--tokenizer", tmp_path, "--import", path, "--json")
    assert ran.status == 2 and ran.json["error"]["code"] == "TC-009"
