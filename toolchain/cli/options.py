"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from toolchain.auto.candidates import METHODS
from toolchain.auto.cost import COSTS
from toolchain.formats import FORMATS, KV_CACHES
from toolchain.plan.policy import CHOICES, PolicyOptions
from toolchain.plan.steps import Sparsity
from toolchain.plan.types import Calibration
from toolchain.quantize.streaming.executor import EXECUTORS, ExecutorOptions

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

PATH = click.Path(path_type=Path)
ENGINES = Path("engines")
"""Where engines are written when nothing else is asked for."""


class EnginePath(click.Path):
    """A directory, or the name of one under ``engines/``."""

    name = "engine"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return engine_path(str(value))


def engine_path(text: str) -> Path:
    """``text`` as it is when it exists or is no bare name, else the engine of that name if there is one."""
    path, named = Path(text), ENGINES / text
    return named if len(path.parts) == 1 and not path.exists() and named.is_dir() else path


ENGINE = EnginePath()


def stack(*decorators: Decorator) -> Decorator:
    """One decorator out of several, in the order in which they shall appear in --help."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
force_option = click.option("--force", is_flag=True, help="Replace what is there.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check and say what would be done; write nothing."
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of every random choice."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N: where the work is done."
)
format_option = click.option(
    "--format",
    "format_name",
    help=f"One of {', '.join(item.name for item in FORMATS)}; or auto, with --bits. Required, unless --recipe is a "
    "file.",
)
format_of_spec = click.option(
    "--format",
    "format_name",
    help=f"One of {', '.join(item.name for item in FORMATS)}; or auto, with --bits. "
    "Required without a spec or a recipe file.",
)
auto_options = stack(
    click.option(
        "--bits",
        type=float,
        metavar="B",
        help="With --format auto: most effective bits per parameter of the whole checkpoint, scales and unquantized "
        "parts included. Each layer group gets the format that costs the least accuracy within it.",
    ),
    click.option(
        "--auto-formats",
        default="",
        help="Candidates of --format auto, separated by commas; the source dtype always is one, except for routed "
        "experts. Default: nvfp4,fp8 where the target runs them, else int4_awq,fp8 or what of it runs.",
    ),
    click.option(
        "--auto-method",
        type=click.Choice(METHODS),
        default=METHODS[0],
        show_default=True,
        help="How damage is scored: KL of each group on held-out text, or ModelOpt's auto_quantize.",
    ),
    click.option(
        "--auto-cost",
        type=click.Choice(COSTS),
        default=COSTS[0],
        show_default=True,
        help="What --bits counts: the whole checkpoint, or routed experts only by the share that a token uses.",
    ),
)
policy_option = stack(
    click.option(
        "--policy",
        help="experts-only, mlp-only or all-linear: which parts are quantized. Default: experts-only for 4-bit formats "
        "of MoE models, else all-linear.",
    ),
    click.option(
        "--attention",
        type=click.Choice(CHOICES["attention"]),
        default=PolicyOptions.attention,
        show_default=True,
        help="Format of attention: as the policy says, the source dtype, FP8, or the main format.",
    ),
    click.option(
        "--shared-experts",
        type=click.Choice(CHOICES["shared_experts"]),
        default=PolicyOptions.shared_experts,
        show_default=True,
        help="Format of shared experts. By default FP8 beside routed experts of 4 bits.",
    ),
    click.option(
        "--lm-head",
        type=click.Choice(CHOICES["lm_head"]),
        default=PolicyOptions.lm_head,
        show_default=True,
        help="Format of the output head.",
    ),
    click.option(
        "--protect-first",
        type=int,
        metavar="K",
        help="Keep the first K layers in the source dtype, experts included. Default: the dense layers before the "
        "first MoE layer, with 4-bit formats.",
    ),
    click.option(
        "--protect-last",
        type=int,
        metavar="K",
        default=PolicyOptions.protect_last,
        show_default=True,
        help="Keep the last K layers in the source dtype.",
    ),
)
sparsity_options = stack(
    click.option(
        "--sparsity",
        metavar="2:4",
        help="Make every quantized matrix sparse before it is quantized, experts included: at most 2 of 4 neighbours "
        "along the input are not zero. Refused where nothing runs faster for it.",
    ),
    click.option(
        "--sparsity-method",
        default=Sparsity.method,
        show_default=True,
        help="magnitude (the largest two stay), or sparsegpt (by the calibration data; in memory only).",
    ),
)
recipe_option = click.option(
    "--recipe",
    help="How scales and codes are chosen: default, best, max, or ingredients joined by + (`toolchain list recipes`). "
    "Or a ModelOpt recipe: a YAML file, or a name such as general/ptq/nvfp4_experts_only-kv_fp8_cast.",
)
kv_cache_option = click.option(
    "--kv-cache", default="none", show_default=True, help=f"KV cache format: {', '.join(KV_CACHES)}."
)
gate_options = stack(
    click.option(
        "--max-kl", type=float, metavar="NATS", help="Gate: largest mean KL to the source, nats per token."
    ),
    click.option(
        "--max-ppl-increase",
        type=float,
        metavar="SHARE",
        help="Gate: largest increase of perplexity over the source's; 0.01 is 1 %.",
    ),
    click.option(
        "--min-top1",
        type=float,
        metavar="SHARE",
        help="Gate: least share of tokens where both prefer the same next token.",
    ),
    click.option(
        "--min-router-agreement",
        type=float,
        metavar="SHARE",
        help="Gate: least share of expert choices in common with the source.",
    ),
)
allow_unfit_option = click.option(
    "--allow-unfit",
    is_flag=True,
    help="Go on although ENGINE failed a gate and is marked as not fit to serve.",
)
stream_option = click.option(
    "--stream/--no-stream",
    default=None,
    help="Quantize shard by shard, in memory that does not grow with the model; for plans that need no data. Default: "
    "where the whole model would not fit into memory.",
)
executor_options = stack(
    click.option(
        "--executor",
        type=click.Choice(EXECUTORS),
        default=ExecutorOptions.name,
        show_default=True,
        help="Who packs what is streamed: threads of this process, or the workers of a Ray cluster, which have the "
        "model and the output under the same paths. The bytes are the same.",
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Head of the Ray cluster. Default: RAY_ADDRESS, or the cluster that runs on this machine.",
    ),
    click.option(
        "--ray-cpus",
        type=int,
        metavar="N",
        help="CPUs of one Ray task, which writes one shard. Default: the cluster's, shared out among the shards.",
    ),
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that the model directory ships. Off unless asked.",
)

calibration_options = stack(
    click.option(
        "--calib-data",
        multiple=True,
        help="Text or JSONL file, a directory of them, or a hub data set name; given several times, samples are drawn "
        "from each evenly. Default: calibration.jsonl of MODEL.",
    ),
    click.option(
        "--calib-samples", type=int, default=Calibration.samples, show_default=True, help="Sequences."
    ),
    click.option(
        "--calib-length",
        type=int,
        default=Calibration.length_tokens,
        show_default=True,
        help="Tokens of each.",
    ),
    click.option("--chat-template", is_flag=True, help="Run calibration records through the chat template."),
    click.option(
        "--calibrate-experts",
        default=Calibration.mode,
        show_default=True,
        help="Experts that see a calibration token: routed (the router's choice), topk (see --calibrate-topk-ratio) or "
        "all. The layer's output stays that of the router's choice.",
    ),
    click.option(
        "--calibrate-topk-ratio",
        type=float,
        help="With topk: the share of all experts that sees each token, the likeliest first.",
    ),
    click.option(
        "--min-tokens-per-expert",
        type=int,
        default=Calibration.min_tokens_per_expert,
        show_default=True,
        help="Draw more samples until the router sent every expert of every layer so many tokens.",
    ),
    click.option(
        "--calib-max-samples",
        type=int,
        default=Calibration.max_samples,
        show_default=True,
        help="Most samples to draw for --min-tokens-per-expert.",
    ),
    click.option(
        "--sampling",
        default=Calibration.sampling,
        show_default=True,
        help="random, or balanced: route four times the samples and choose those that fill the experts evenly.",
    ),
    click.option("--strict", is_flag=True, help="Fail, writing nothing, when experts stay short of tokens."),
    click.option(
        "--allow-tf32",
        is_flag=True,
        help="TensorFloat-32 in float32 matmuls of calibration: faster, less exact.",
    ),
)
