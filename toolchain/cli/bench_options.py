"""Options of `toolchain bench`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

from toolchain.bench.settings import ENDPOINTS, TARGETS, Settings
from toolchain.cli.options import PATH, stack
from toolchain.core.errors import UsageError

target_options = stack(
    click.option(
        "--target",
        type=click.Choice(["auto", *TARGETS]),
        default="auto",
        show_default=True,
        help="How it is asked. auto: Triton over gRPC for an ENGINE; at an address what answers there.",
    ),
    click.option(
        "--endpoint",
        type=click.Choice(ENDPOINTS),
        default=Settings.endpoint,
        show_default=True,
        help="Of an OpenAI server.",
    ),
    click.option(
        "--model", default="", help="Its name on the server. Default: tensorrt_llm, or OpenAI's first."
    ),
    click.option(
        "--tokenizer", type=PATH, help="Engine or checkpoint that the server serves; needed with a URL."
    ),
    click.option("--gpus", type=click.IntRange(1), help="GPUs of the server, for tokens/s per GPU."),
)
load_options = stack(
    click.option(
        "--concurrency",
        help="Closed loop: users at once, comma separated. Default: 1,4,16, unless --rate is given.",
    ),
    click.option(
        "--rate", help="Open loop: requests per second, comma separated; sent on time whatever is open."
    ),
    click.option(
        "--arrival",
        default=Settings.arrival,
        show_default=True,
        help="With --rate: poisson, constant, or gamma:CV (coefficient of variation of the gaps).",
    ),
    click.option(
        "--max-outstanding",
        type=int,
        default=Settings.max_outstanding,
        show_default=True,
        help="With --rate: most requests at once; what is due beyond them waits, and its waiting counts.",
    ),
    click.option(
        "--requests",
        type=int,
        help="Measured requests of each level and repeat. Default: 32; of a trace all.",
    ),
    click.option(
        "--duration-s", type=float, help="Instead of --requests: what starts within so many seconds."
    ),
    click.option(
        "--warmup", type=int, help="Requests before the measured ones. Default: as many as users, at least 2."
    ),
    click.option(
        "--repeats",
        type=int,
        default=Settings.repeats,
        show_default=True,
        help="Of all levels in turn; confidence intervals are over them.",
    ),
    click.option(
        "--prompt-tokens",
        default=str(Settings.prompt_tokens),
        show_default=True,
        help="A number, normal:MEAN,STD, uniform:LOW,HIGH, lognormal:MEDIAN,SIGMA or exponential:MEAN.",
    ),
    click.option(
        "--output-tokens",
        default=str(Settings.output_tokens),
        show_default=True,
        help="The same, of answers.",
    ),
    click.option(
        "--trace",
        type=click.Path(),
        help="JSON lines (timestamp, input_length or prompt, output_length) or CSV (Azure, BurstGPT) to replay: its "
        "lengths, and without --concurrency and --rate its times.",
    ),
    click.option("--trace-speed", type=float, default=1.0, show_default=True, help="2: twice as fast."),
    click.option("--ttft-slo", "ttft_slo_ms", type=float, metavar="MS", help="Goodput: largest TTFT."),
    click.option(
        "--itl-slo",
        "itl_slo_ms",
        type=float,
        metavar="MS",
        help="Goodput: largest mean time per token (TPOT).",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=float,
        default=Settings.timeout_s,
        show_default=True,
        help="Seconds that one request may take.",
    ),
    click.option(
        "--ignore-eos/--stop-at-eos",
        default=True,
        show_default=True,
        help="Whether answers are as long as asked for, or end where the model ends them.",
    ),
    click.option(
        "--ceiling/--no-ceiling",
        default=True,
        show_default=True,
        help="Also measure what the load generator itself can do, against a server that does nothing.",
    ),
)


def make_settings(options: dict[str, Any]) -> Settings:
    """Settings of the options above and --seed. UsageError for what does not go together."""
    given = {key: value for key, value in options.items() if value is not None}
    replayed = "trace" in given and "concurrency" not in given and "rate" not in given
    for name, kind in (("concurrency", int), ("rate", float)):
        if name in given:
            given[name] = tuple(_numbers(name, given[name], kind))
    if "rate" in given or replayed:
        given.setdefault("concurrency", ())
    if "trace" in given:
        given.setdefault("requests", 0)
    names = {field.name for field in fields(Settings)}
    return Settings(**{key: value for key, value in given.items() if key in names})


def _numbers(name: str, text: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{name} {text!r}: expected numbers such as 1,4,16", code="TC-009") from error
