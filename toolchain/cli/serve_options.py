"""Options of `toolchain serve`, and those that it shares with `toolchain triton`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from toolchain.cli.options import PATH, stack
from toolchain.cli.running import kernel_options
from toolchain.core.errors import UsageError

WISHES = ("kernels", "kv_cache", "kv_layout")
LIMITS = ("max_waiting", "max_waiting_tokens", "max_queue_s")
RENDERING = ("instances", "gpu_device_ids", "versions", "warmup_requests", *LIMITS, *WISHES)
"""Options that are written into the repository."""
port_options = stack(
    click.option("--http-port", type=int, default=8000, show_default=True, help="0 chooses a free one."),
    click.option("--grpc-port", type=int, default=8001, show_default=True, help="0 chooses a free one."),
    click.option(
        "--metrics-port", type=int, default=8002, show_default=True, help="Triton's; 0: a free one."
    ),
    click.option(
        "--status-port",
        type=int,
        default=8003,
        show_default=True,
        help="Of the supervision: /health/live, /health/ready, /metrics, /status; 0: a free one.",
    ),
    click.option(
        "--address",
        default="127.0.0.1",
        show_default=True,
        help="Of Triton and the supervision; 0.0.0.0 exposes them, without any key, to the network.",
    ),
)
warmup_option = click.option(
    "--warmup-requests",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Target local: inferences of several lengths and batch sizes that run before a model is ready.",
)
engines_options = stack(
    click.option("--model-name", help="Name of the model in Triton, for one ENGINE. Default: tensorrt_llm."),
    click.option(
        "--instances",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="How many engines of each model, each with its own weights and batch.",
    ),
    click.option("--gpu-device-ids", default="", help='GPUs of each instance, such as "0;1" or "0,1;2,3".'),
    click.option(
        "--versions",
        default="latest:1",
        show_default=True,
        help="Versions that are served: latest:N, all, or numbers.",
    ),
    warmup_option,
    click.option(
        "--max-waiting", type=click.IntRange(min=0), help="Target local: most requests in the queue."
    ),
    click.option(
        "--max-waiting-tokens",
        type=click.IntRange(min=0),
        help="Target local: most prompt tokens in the queue.",
    ),
    click.option(
        "--max-queue-s",
        type=click.FloatRange(min=0),
        help="Target local: longest wait in the queue, seconds.",
    ),
    kernel_options,
)
openai_options = stack(
    click.option("--openai", is_flag=True, help="Also an OpenAI-compatible endpoint."),
    click.option("--openai-port", type=int, default=8004, show_default=True, help="0 chooses a free one."),
    click.option(
        "--openai-address",
        default="127.0.0.1",
        show_default=True,
        help="Another one than loopback needs --api-key-file.",
    ),
    click.option("--api-key-file", type=PATH, help="Keys of the OpenAI endpoint, one per line."),
    click.option(
        "--chat-template",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Jinja file for chats, instead of that of ENGINE's tokenizer.",
    ),
)
drain_options = stack(
    click.option(
        "--drain-timeout-s",
        type=click.IntRange(min=5),
        default=30,
        show_default=True,
        help="How long running streams may take to end after SIGTERM.",
    ),
    click.option(
        "--probe-interval-s",
        type=click.FloatRange(min=0.1),
        default=2.0,
        show_default=True,
        help="How often every model is probed.",
    ),
    click.option(
        "--hang-timeout-s",
        type=click.FloatRange(min=1),
        default=60.0,
        show_default=True,
        help="An engine that generates nothing for so long, while asked to, is started again.",
    ),
    click.option(
        "--max-recoveries",
        type=click.IntRange(min=0),
        default=5,
        show_default=True,
        help="Within 10 minutes; one more ends the server with status 4.",
    ),
)


def rendering(given: dict[str, Any]) -> dict[str, Any]:
    """``engines_options`` as arguments of ``render_repository``."""
    from toolchain.runtime.ways import Wish
    from toolchain.triton.served import QueueLimits

    plain = [name for name in ("model_name", *RENDERING) if name not in (*LIMITS, *WISHES)]
    return {
        **{name: given[name] for name in plain},
        "queue_limits": QueueLimits(**{name: given[name] for name in LIMITS}),
        "wish": Wish(**{name: given[name] for name in WISHES}),
    }


def refuse_ignored(repository: Path) -> None:
    """UsageError TC-618 for options of rendering on the command line where ``repository`` is rendered already."""
    context = click.get_current_context()
    given = [name for name in RENDERING if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(
            f"{repository} is rendered already; {names} would not be heeded",
            hint="--force renders it again",
            code="TC-618",
        )


def default_repository(engines: Sequence[Any]) -> Path:
    """triton_repo/<engine>, of several engines triton_repo/<engine>+<engine>..."""
    return Path("triton_repo") / "+".join(engine.name for engine in engines)
