"""Results of ``trtllm-bench --report_json`` in this toolchain's own shape.

Keys and units as ``tensorrt_llm/bench/dataclasses/reporting.py`` of NVIDIA/TensorRT-LLM writes them
(0249976575050d2c624a5f285683c66de311a3b7): times in milliseconds, rates per second, memory in GiB. Everything that
is said twice is compared, so that another unit or meaning is refused and not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolchain.bench.types import BenchResult, Distribution, Level, Settings
from toolchain.core.errors import FindingsError, UsageError
from toolchain.core.files import read_json, sha256_file
from toolchain.core.findings import Finding, errors

CODE = "TC-705"
READ_RELEASES = ("1.2.0", "1.2.1")
"""Releases of about the age of the source above."""
TOLERANCE = 0.02
"""Relative difference between what is said twice; averages over requests are rounded and timed apart."""
NEEDED = {
    "engine": ("version", "model"),
    "world_info": ("tp_size", "pp_size", "world_size"),
    "request_info": ("num_requests", "avg_num_concurrent_requests", "avg_input_length", "avg_output_length"),
    "performance": (
        "total_latency_ms",
        "avg_request_latency_ms",
        "request_throughput_req_s",
        "system_output_throughput_tok_s",
        "output_throughput_per_gpu_tok_s",
        "request_latency_percentiles_ms",
    ),
}
QUANTILES = ("p50", "p90", "p99")
OPTIONAL = {"p95": "p95", "min": "minimum", "max": "maximum"}


@dataclass(frozen=True, kw_only=True)
class Imported:
    result: BenchResult
    warnings: tuple[Finding, ...]


def import_report(path: Path, *, engine_dir: Path, known_releases: tuple[str, ...]) -> Imported:
    """The report in ``path``, measured with the engine in ``engine_dir``.

    FindingsError TC-705 with every contradiction: keys that are missing, figures that do not fit each other (another
    unit), another release, parallelism or quantization than the engine's. A release that is not in
    ``known_releases`` is a warning, the figures are checked all the same.
    """
    report = read_json(path)
    if not isinstance(report, dict):
        raise UsageError(f"{path} holds a {type(report).__name__}, expected an object", code=CODE)
    found = list(_missing(report, path))
    if not found:
        found = [*_contradictions(report, path), *_other_engine(report, engine_dir, path)]
        found += _unknown_release(report, known_releases, path)
    if errors(found):
        raise FindingsError(
            f"{path} is no report of trtllm-bench for {engine_dir}",
            found,
            hint="measure with the commands of commands.md in the engine, and --report_json",
            code=CODE,
        )
    return Imported(result=_result(report, path, engine_dir), warnings=tuple(found))


def _missing(report: dict[str, Any], path: Path) -> Iterator[Finding]:
    for section, keys in NEEDED.items():
        part = report.get(section)
        absent = [key for key in keys if not isinstance(part, dict) or part.get(key) is None]
        if absent:
            message = f"{section} has no {', '.join(absent)}"
            yield Finding(
                code=CODE, where=str(path), message=message, hint="its shape changed, or it is no report"
            )
    for name, values in _percentiles(report).items():
        absent = [key for key in (*QUANTILES, "average") if not isinstance(values.get(key), int | float)]
        if absent:
            yield Finding(code=CODE, where=str(path), message=f"{name} has no {', '.join(absent)}")


def _percentiles(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Place -> percentiles, of the latency of whole requests and, with --streaming, of TTFT and TPOT."""
    places = {
        "performance.request_latency_percentiles_ms": ("performance", "request_latency_percentiles_ms"),
        "streaming_metrics.ttft_percentiles": ("streaming_metrics", "ttft_percentiles"),
        "streaming_metrics.tpot_percentiles": ("streaming_metrics", "tpot_percentiles"),
    }
    return {
        name: value if isinstance(value, dict) else {}
        for name, (section, key) in places.items()
        if isinstance(report.get(section), dict) and (value := report[section].get(key)) is not None
    }


def _contradictions(report: dict[str, Any], path: Path) -> Iterator[Finding]:
    """What is said twice and differs: the sign of another unit."""
    requests, speed = report["request_info"], report["performance"]
    seconds = speed["total_latency_ms"] / 1000
    if seconds <= 0 or requests["num_requests"] < 1:
        message = f"{requests['num_requests']} requests in {seconds} s: nothing was measured"
        yield Finding(code=CODE, where=str(path), message=message)
        return
    tokens = requests["avg_output_length"] * requests["num_requests"]
    system, each = speed["system_output_throughput_tok_s"], speed["output_throughput_per_gpu_tok_s"]
    pairs = [
        ("request_throughput_req_s", speed["request_throughput_req_s"], requests["num_requests"] / seconds),
        ("system_output_throughput_tok_s", system, tokens / seconds),
        ("output_throughput_per_gpu_tok_s", each, system / report["world_info"]["world_size"]),
    ]
    averages = {
        "performance.request_latency_percentiles_ms": speed["avg_request_latency_ms"],
        "streaming_metrics.ttft_percentiles": report.get("streaming_metrics", {}).get("avg_ttft_ms"),
        "streaming_metrics.tpot_percentiles": report.get("streaming_metrics", {}).get("avg_tpot_ms"),
    }
    percentiles = _percentiles(report)
    pairs += [
        (f"{name}.average", percentiles[name]["average"], averages[name])
        for name in percentiles
        if averages[name]
    ]
    for name, said, computed in pairs:
        if abs(said - computed) > TOLERANCE * max(abs(said), abs(computed)):
            message = f"{name} is {said:.6g}, the other figures give {computed:.6g}"
            yield Finding(
                code=CODE, where=str(path), message=message, hint="milliseconds and seconds are expected"
            )
    longest = percentiles["performance.request_latency_percentiles_ms"]["p99"]
    if longest > speed["total_latency_ms"] * (1 + TOLERANCE):
        message = (
            f"a request took {longest:.6g} ms (p99), all of them together {speed['total_latency_ms']:.6g} ms"
        )
        yield Finding(code=CODE, where=str(path), message=message)
    for name, values in percentiles.items():
        if not values["p50"] <= values["p90"] <= values["p99"]:
            yield Finding(code=CODE, where=str(path), message=f"{name}: percentiles do not rise")


def _other_engine(report: dict[str, Any], engine_dir: Path, path: Path) -> Iterator[Finding]:
    """What differs from the engine that it is imported into."""
    manifest = read_json(engine_dir / "engine.json")
    parallel, world = manifest["parallel"], report["world_info"]
    pairs: list[tuple[str, Any, Any]] = [
        ("TensorRT-LLM", report["engine"]["version"], manifest["target_version"]),
        ("tp", world["tp_size"], parallel["tp"]),
        ("pp", world["pp_size"], parallel["pp"]),
    ]
    quantization = report["engine"].get("quantization")
    if quantization:
        pairs.append(("quantization", str(quantization).rpartition(".")[2].upper(), manifest["quant_algo"]))
    for name, said, expected in pairs:
        if said != expected:
            message = f"{name} is {said} in the report, {expected} in the engine"
            yield Finding(code=CODE, where=str(path), message=message, hint="it measured another engine")


def _unknown_release(report: dict[str, Any], known: tuple[str, ...], path: Path) -> Iterator[Finding]:
    version = report["engine"]["version"]
    if version not in known:
        message = f"reports of TensorRT-LLM {version} have not been seen; read as those of {known[-1]}"
        hint = "its figures fit each other; compare one by hand"
        yield Finding(code=CODE, where=str(path), message=message, hint=hint, severity="warning")


def _result(report: dict[str, Any], path: Path, engine_dir: Path) -> BenchResult:
    requests, streaming = report["request_info"], "streaming_metrics" in report
    machine = report.get("machine") or {}
    memory = machine.get("memory.total")
    gpu = f"{machine.get('name', 'unknown GPU')}{f', {memory:.0f} GiB' if memory else ''}"
    level = _level(report)
    version = str(report["engine"]["version"])
    return BenchResult(
        created=datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        url="trtllm-bench",
        model=str(report["engine"]["model"]),
        settings=Settings(
            concurrency=(level.concurrency or 1,),
            requests=level.requests,
            prompt_tokens=max(1, round(requests["avg_input_length"])),
            output_tokens=max(1, round(requests["avg_output_length"])),
            timeout_s=level.duration_s,
            repeats=1,
            ceiling=False,
        ),
        environment={
            "packages": {"tensorrt-llm": version},
            "gpus": [gpu] * report["world_info"]["world_size"] if machine else [],
            "server": {"name": "trtllm-bench", "version": version},
            "engine": {
                "name": engine_dir.absolute().name,
                "manifest_sha256": sha256_file(engine_dir / "engine.json"),
            },
            "report": {"file": path.name, "sha256": sha256_file(path), **_kept(report)},
        },
        levels=(level,),
        target="trtllm-bench",
        tool="trtllm-bench",
        gpus=int(report["world_info"]["world_size"]),
        token_counting="token ids of TensorRT-LLM",
        load=f"trtllm-bench in one process, {'streaming' if streaming else 'without streaming'}; users: average of "
        "requests at once",
    )


def _level(report: dict[str, Any]) -> Level:
    requests, speed = report["request_info"], report["performance"]
    count, found = int(requests["num_requests"]), _percentiles(report)

    def distribution(name: str) -> Distribution | None:
        values = found.get(name)
        if values is None:
            return None
        p50, p90, p99 = (float(values[key]) for key in QUANTILES)
        rest = {ours: values.get(theirs) for ours, theirs in OPTIONAL.items()}
        return Distribution(p50=p50, p90=p90, p99=p99, mean=float(values["average"]), count=count, **rest)

    return Level(
        concurrency=max(1, round(requests["avg_num_concurrent_requests"])),
        requests=count,
        errors=0,
        error_messages={},
        warmup_errors=0,
        duration_s=speed["total_latency_ms"] / 1000,
        ttft_ms=distribution("streaming_metrics.ttft_percentiles"),
        itl_ms=None,
        tpot_ms=distribution("streaming_metrics.tpot_percentiles"),
        e2e_ms=distribution("performance.request_latency_percentiles_ms"),
        prompt_tokens=round(requests["avg_input_length"] * count),
        output_tokens=round(requests["avg_output_length"] * count),
        output_tokens_per_s=float(speed["system_output_throughput_tok_s"]),
        requests_per_s=float(speed["request_throughput_req_s"]),
        output_tokens_per_s_per_gpu=float(speed["output_throughput_per_gpu_tok_s"]),
    )


def _kept(report: dict[str, Any]) -> dict[str, Any]:
    """What has no place in our shape and says how it was measured."""
    return {
        key: report[key] for key in ("engine", "world_info", "decoding_stats", "dataset") if key in report
    }
