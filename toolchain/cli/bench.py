"""toolchain bench ENGINE|URL (run), toolchain bench compare A B"""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from toolchain.cli.bench_compare import command as compare
from toolchain.cli.bench_options import load_options, make_settings, target_options
from toolchain.cli.options import PATH, dry_run_option, engine_path, force_option, json_option, seed_option
from toolchain.cli.output import Terminal, emit, facts
from toolchain.core.errors import UsageError


class RunByDefault(click.Group):
    """``toolchain bench ENGINE`` is short for ``toolchain bench run ENGINE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(name="bench", cls=RunByDefault)
def command() -> None:
    """Measure latency and throughput of a served engine, or compare two measurements.

    \b
    toolchain bench ENGINE                       start a server, measure it (the same as `bench run ENGINE`)
    toolchain bench http://HOST:PORT ...         measure a running one: Triton, trtllm-serve, NIM, vLLM
    toolchain bench ENGINE --target inprocess    the engine alone, without a server
    toolchain bench compare A B                  is B slower than A, and is it more than chance?
    """


command.add_command(compare)


@command.command(name="run")
@click.argument("what", metavar="ENGINE|URL")
@target_options
@load_options
@click.option(
    "--engine",
    "tool",
    type=click.Choice(["toolchain", "aiperf"]),
    default="toolchain",
    show_default=True,
    help="Which load generator measures. aiperf: `make aiperf` installs it in an environment of its own.",
)
@click.option(
    "--import",
    "report",
    type=PATH,
    help="Measure nothing: take the --report_json file of trtllm-bench as the result of ENGINE.",
)
@click.option("--output", type=PATH, help="JSON file. Default: ENGINE/bench/<time>.json.")
@click.option("--records", type=PATH, help="JSON lines: times of every request and response.")
@seed_option
@dry_run_option
@force_option
@json_option
@click.pass_context
def run(
    ctx: click.Context,
    what: str,
    tool: str,
    report: Path | None,
    output: Path | None,
    records: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    tokenizer: Path | None,
    model: str,
    gpus: int | None,
    **options: Any,
) -> None:
    """Measure a served engine: TTFT, ITL, end to end, tokens/s and goodput, closed or open loop.

    With an ENGINE directory a server is started for the measurement; with an address a running one is measured:
    host:port, grpc://host:port or http://host:port. A plain checkpoint is run in this process by the same runtime: what
    quantization is compared with. Ctrl-C keeps what was measured so far.
    """
    from toolchain.bench.results import write_result
    from toolchain.core.files import refuse_file

    settings = make_settings(options)
    engine = _engine(what, tokenizer)
    if plain := engine is not None and not (engine / "engine.json").is_file():
        settings = _in_process(settings, what)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = output or (engine / "bench" / f"{stamp}.json" if engine and not plain else None)
    for file in (path, records):
        if file is not None:
            refuse_file(file, force=force)
    if report is not None:
        _import(report, engine, None if dry_run else path, as_json)
        return
    if dry_run:
        rows = {"what": what, **asdict(settings), "output": path and str(path), "dry_run": True}
        emit(rows, as_json, facts(rows.items()))
        return
    common: dict[str, Any] = {"tokenizer_dir": tokenizer or engine, "engine_dir": engine or tokenizer}
    common |= {"settings": settings, "model": model, "gpus": gpus, "progress": Terminal()}
    with contextlib.ExitStack() as stack:
        result = _measure(what, engine, stack, tool=tool, records=records, common=common)
    if path is not None:
        write_result(path, result)
    _show(result, path, as_json)
    if result.partial:
        ctx.exit(130)
    if result.errors:
        ctx.exit(1)


def _measure(
    what: str,
    engine: Path | None,
    stack: contextlib.ExitStack,
    *,
    tool: str,
    records: Path | None,
    common: dict[str, Any],
) -> Any:
    """The result of our own generator, or of aiperf."""
    from toolchain.bench.connect import target_of
    from toolchain.bench.run import run_bench
    from toolchain.cli.bench_server import start

    settings = common["settings"]
    if tool == "aiperf" and engine is not None and settings.target == "auto":
        settings = common["settings"] = _over_http(settings)
    server: Any = start(engine, settings.target, stack) if engine else what
    if tool == "toolchain":
        return run_bench(server, records=records, **common)
    if records is not None:
        raise UsageError("--records is of the toolchain's own load generator", code="TC-009")
    from toolchain.bench.aiperf import run_aiperf

    spec, _ = target_of(server, settings, common["model"])
    return run_aiperf(url=spec.url, target=spec.kind, **{**common, "model": spec.model})


def _in_process(settings: Any, what: str) -> Any:
    """A checkpoint has no repository to serve."""
    from dataclasses import replace

    if settings.target not in ("auto", "inprocess"):
        raise UsageError(
            f"{what} is a checkpoint, not an engine: it cannot be served for target {settings.target}",
            hint="leave --target out, or build an engine of it: toolchain engine MODEL",
            code="TC-009",
        )
    return replace(settings, target="inprocess")


def _over_http(settings: Any) -> Any:
    """aiperf has no gRPC."""
    from dataclasses import replace

    return replace(settings, target="triton-http")


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
    _show(imported.result, path, as_json)


def _show(result: Any, path: Path | None, as_json: bool) -> None:
    from toolchain.cli.bench_text import render

    emit(result.to_json(), as_json, render(result) + (f"\n\nwritten to {path}" if path else ""))


def _engine(what: str, tokenizer: Path | None) -> Path | None:
    """The engine, or plain checkpoint, that ``what`` names; None for the address of a server."""
    from toolchain.triton.engine_dir import read_engine_dir

    engine = engine_path(what)
    if engine.is_dir():
        plain = (engine / "config.json").is_file() and not (engine / "engine.json").is_file()
        return engine.absolute() if plain else read_engine_dir(engine).path
    if tokenizer is None:
        raise UsageError(
            f"{what} is no engine directory; to measure a server by address, --tokenizer must name the engine it "
            "serves",
            hint="toolchain bench 127.0.0.1:8001 --tokenizer engines/mine",
            code="TC-009",
        )
    return None
