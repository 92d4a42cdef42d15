"""toolchain bench"""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import (
    PATH,
    dry_run_option,
    engine_path,
    force_option,
    json_option,
    seed_option,
)
from toolchain.cli.output import Terminal, emit, facts, table
from toolchain.core.errors import UsageError


@click.command(name="bench")
@click.argument("target", metavar="ENGINE|URL")
@click.option("--concurrency", default="1,4,16", show_default=True, help="Requests at once, comma separated.")
@click.option("--requests", type=int, default=32, show_default=True, help="Requests at each concurrency.")
@click.option("--prompt-tokens", type=int, default=64, show_default=True)
@click.option("--output-tokens", type=int, default=32, show_default=True)
@click.option(
    "--timeout", type=float, default=300.0, show_default=True, help="Seconds that one request may take."
)
@click.option(
    "--tokenizer", type=PATH, help="Engine or checkpoint that the server serves; needed with a URL."
)
@click.option(
    "--import",
    "report",
    type=PATH,
    help="Measure nothing: take the --report_json file of trtllm-bench as the result of ENGINE.",
)
@click.option("--output", type=PATH, help="JSON file. Default: ENGINE/bench/<time>.json.")
@seed_option
@dry_run_option
@force_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    target: str,
    concurrency: str,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    timeout: float,
    tokenizer: Path | None,
    report: Path | None,
    output: Path | None,
    seed: int,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Measure a served engine over gRPC streaming: TTFT, ITL, end to end, tokens/s at several concurrencies.

    With an ENGINE directory a server is started for the measurement; with host:port a running one is measured.
    """
    from toolchain.bench.results import write_result
    from toolchain.bench.run import run_bench
    from toolchain.bench.types import Settings
    from toolchain.core.files import refuse_file

    settings = Settings(
        concurrency=tuple(_numbers(concurrency)),
        requests=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
        timeout_s=timeout,
    )
    engine = _engine(target, tokenizer)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = output or (engine / "bench" / f"{stamp}.json" if engine else None)
    if path is not None:
        refuse_file(path, force=force)
    if report is not None:
        _import(report, engine, None if dry_run else path, as_json)
        return
    if dry_run:
        rows = {"target": target, **asdict(settings), "output": path and str(path), "dry_run": True}
        emit(rows, as_json, facts(rows.items()))
        return
    with contextlib.ExitStack() as stack:
        server: Any = _start(engine, stack) if engine else target
        result = run_bench(
            server,
            tokenizer_dir=tokenizer or engine or Path(target),
            engine_dir=engine,
            progress=Terminal(),
            concurrency=settings.concurrency,
            requests=requests,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            seed=seed,
            timeout_s=timeout,
        )
    if path is not None:
        write_result(path, result)
    emit(result.to_json(), as_json, _render(result) + (f"\n\nwritten to {path}" if path else ""))
    if result.errors:
        ctx.exit(1)


def _import(report: Path, engine: Path | None, path: Path | None, as_json: bool) -> None:
    """Read, check and show a report of trtllm-bench; written unless ``path`` is None."""
    from toolchain.bench.results import write_result
    from toolchain.bench.trtllm import READ_RELEASES, import_report

    if engine is None:
        hint = "toolchain bench engines/mine --import report.json"
        raise UsageError("--import needs the ENGINE directory that was measured", hint=hint, code="TC-009")
    imported = import_report(report, engine_dir=engine, known_releases=READ_RELEASES)
    for warning in imported.warnings:
        Terminal().note(str(warning))
    if path is not None:
        write_result(path, imported.result)
    emit(
        imported.result.to_json(),
        as_json,
        _render(imported.result) + (f"\n\nwritten to {path}" if path else ""),
    )


def _engine(target: str, tokenizer: Path | None) -> Path | None:
    """The engine directory that ``target`` names; None for the address of a server."""
    from toolchain.triton.engine_dir import read_engine_dir

    engine = engine_path(target)
    if engine.is_dir():
        return read_engine_dir(engine).path
    if tokenizer is None:
        raise UsageError(
            f"{target} is no engine directory; to measure a server by address, --tokenizer must name the engine it "
            "serves",
            hint="toolchain bench 127.0.0.1:8001 --tokenizer engines/mine",
            code="TC-009",
        )
    return None


def _start(engine: Path, stack: contextlib.ExitStack) -> Any:
    from toolchain.triton.engine_dir import read_engine_dir
    from toolchain.triton.freshness import refuse_stale_repository
    from toolchain.triton.inflight_launch import refuse_here
    from toolchain.triton.render import render_repository
    from toolchain.triton.server import TritonServer

    found = read_engine_dir(engine)
    repository = Path("triton_repo") / found.name
    if not repository.is_dir():
        render_repository(engine, repository, allow_unfit=True)  # to measure is not to serve
    refuse_stale_repository(found, repository)
    if found.target == "tensorrt":
        refuse_here(found, repository)
    return stack.enter_context(TritonServer(repository, progress=Terminal()))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--concurrency {text!r}: expected numbers such as 1,4,16", code="TC-009") from error


def _render(result: Any) -> str:
    rows = []
    for level in result.levels:
        cells: list[Any] = [level.concurrency, level.requests, level.errors]
        for name in ("ttft_ms", "itl_ms", "e2e_ms"):
            found = getattr(level, name)
            cells += [f"{getattr(found, key):.1f}" if found else "-" for key in ("p50", "p90", "p99")]
        rows.append([*cells, f"{level.output_tokens_per_s:.1f}", f"{level.requests_per_s:.2f}"])
    heads = ["users", "requests", "errors"]
    heads += [f"{name} {key}" for name in ("TTFT", "ITL", "E2E") for key in ("p50", "p90", "p99")]
    note = "times in ms; ITL: gaps between successive responses with text"
    return table([*heads, "tokens/s", "requests/s"], rows) + f"\n{note}"
