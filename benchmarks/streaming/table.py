"""The result file from the single runs, and its markdown table."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.streaming.architectures import ARCHITECTURES, BY_NAME, SIZES_GB, model_name
from benchmarks.streaming.methods import FLOOR, METHODS, OURS_FIRST
from benchmarks.streaming.places import DEVICE_RECORD, MARKDOWN, RESULT, run_file
from toolchain.core.files import atomic_write_json, atomic_write_text, read_json

PROJECTED = {"Qwen3-235B-A22B": ("qwen3_moe", 470e9), "DeepSeek-V3 671B": ("deepseek_v3", 689e9)}
"""The measured model of the same layout, and bytes on the hub."""
Row = dict[str, Any]
FIGURES = ("seconds", "cpu_user_s", "cpu_system_s", "disk_read_bytes", "disk_written_bytes", "output_bytes")


def assemble() -> dict[str, Any]:
    """One row per (model, method): medians over rounds, the largest memory of any round."""
    rows = []
    machines: list[Row] = []
    versions: Row = {}
    for size in SIZES_GB:
        for design in ARCHITECTURES:
            for method in (*(method.name for method in METHODS), FLOOR):
                path = run_file(model_name(design.name, size), method)
                if not path.is_file():
                    continue
                record = read_json(path)
                rows.append(_row(design.name, size, record))
                machines += [record["machine"]] if record["machine"] not in machines else []
                versions |= record["versions"]
    return {"machines": machines, "versions": versions, "rows": rows, "device": _device()}


def _row(architecture: str, size_gb: int, record: Row) -> Row:
    good = [made for made in record["rounds"] if "error" not in made]
    row = {"architecture": architecture, "size_gb": size_gb, "method": record["method"], "rounds": len(good)}
    row["source_bytes"] = record["source_bytes"]
    if not good:
        return row | {"error": record["rounds"][-1]["error"]}
    row |= {name: statistics.median(made[name] for made in good) for name in FIGURES}
    row["seconds_range"] = [min(made["seconds"] for made in good), max(made["seconds"] for made in good)]
    row["peak_rss_bytes"] = max(made["peak_rss_bytes"] for made in good)
    row["anonymous_peak_bytes"] = max(made["anonymous_peak_bytes"] for made in good)
    if all("cgroup_peak_bytes" in made for made in good):
        row["cgroup_peak_bytes"] = max(made["cgroup_peak_bytes"] for made in good)
    return row


def write(result: dict[str, Any]) -> None:
    RESULT.parent.mkdir(exist_ok=True)
    atomic_write_json(RESULT, result)
    atomic_write_text(MARKDOWN, render(result) + "\n")


def _device() -> Row | None:
    return read_json(DEVICE_RECORD) if DEVICE_RECORD.is_file() else None


HEAD = (
    "| model | GB | method | seconds | s/GB | MB/s read + written | CPU s | peak memory, GB | disk alone, s | "
    "time against ours |"
)


def render(result: dict[str, Any]) -> str:
    """Markdown: one table, then growth and what the numbers are of."""
    rows = result["rows"]
    lines = [HEAD, "|---|---|---|---|---|---|---|---|---|---|"]
    lines += [_line(row, rows) for row in rows if row["method"] != FLOOR]
    growth = [line for row in rows if (line := _growth(row, rows))]
    if growth:
        lines += ["", "Beyond the smallest model, so without start-up: " + "; ".join(growth) + "."]
    machines = "; ".join(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB"
        for machine in result["machines"]
    )
    lines += [
        "",
        f"{machines}. Whole processes, start-up included, files not in the page cache; medians, memory the largest of "
        "all rounds (`ru_maxrss`). *Disk alone*: the same bytes read, written and flushed by as many threads without "
        "arithmetic. *Time against ours*: over that of the same format.",
    ]
    if result["device"]:
        lines += ["", *(f"- {line}" for line in show(result["device"]).splitlines())]
    return "\n".join(lines)


def _find(rows: list[Row], like: Row, method: str) -> Row | None:
    same = ("architecture", "size_gb")
    return next(
        (
            row
            for row in rows
            if row["method"] == method and "error" not in row and all(row[key] == like[key] for key in same)
        ),
        None,
    )


def _line(row: Row, rows: list[Row]) -> str:
    size = row["source_bytes"] / 1e9
    start = f"| {row['architecture']} | {size:.1f} | {row['method']} |"
    if "error" in row:
        return f"{start} failed |||||||"
    floor, ours = _find(rows, row, FLOOR), _find(rows, row, OURS_FIRST)
    moved = row["source_bytes"] + row["output_bytes"]
    seconds = row["seconds"]
    cells = [
        f"{seconds:.1f}",
        f"{seconds / size:.2f}",
        f"{moved / seconds / 1e6:.0f}",
        f"{row['cpu_user_s'] + row['cpu_system_s']:.1f}",
        f"{row['peak_rss_bytes'] / 1e9:.2f}" + _limit(row),
        f"{floor['seconds']:.1f} ({100 * floor['seconds'] / seconds:.0f} %)" if floor else "-",
        f"{seconds / ours['seconds']:.1f}" if ours else "-",
    ]
    return f"{start} {' | '.join(cells)} |"


def _limit(row: Row) -> str:
    """What calibrated streaming is allowed: two layers and a gigabyte."""
    if not row["method"].endswith("calibrated"):
        return ""
    return f" (2 layers + 1 GB: {2 * BY_NAME[row['architecture']].layer_bytes() / 1e9 + 1:.2f})"


def _growth(row: Row, rows: list[Row]) -> str | None:
    """Seconds per GB from the next smaller size to this one."""
    smaller = [size for size in SIZES_GB if size < row["size_gb"]]
    if not smaller or "error" in row or not row["method"].startswith("ours"):
        return None
    before = _find(rows, {**row, "size_gb": smaller[-1]}, row["method"])
    if before is None:
        return None
    slope = (row["seconds"] - before["seconds"]) / (row["source_bytes"] - before["source_bytes"]) * 1e9
    return f"{row['architecture']} {row['method']} {smaller[-1]} to {row['size_gb']} GB {slope:.2f} s/GB"


def show(found: dict[str, Any]) -> str:
    lines = []
    for name, rate in found["from_memory"].items():
        disk = found["from_disk"][name]["source_bytes_per_s"]
        lines.append(
            f"{found['device']}, {name}: {rate / 1e9:.2f} GB/s of source from its memory (one stream), "
            f"{disk / 1e9:.2f} GB/s from the disk, written, flushed and hashed"
        )
    for name, (kind, size) in PROJECTED.items():
        disk, memory = found["from_disk"][kind]["source_bytes_per_s"], found["from_memory"][kind]
        lines.append(
            f"projection, not measured: {name}, {size / 1e9:.0f} GB: {size / disk / 60:.0f} min from this disk, "
            f"{size / memory / 60:.1f} min if the disk took no time"
        )
    return "\n".join(lines)
