"""Options of `toolchain serve`, and those that it shares with `toolchain triton`."""

from __future__ import annotations

import click

from toolchain.cli.options import PATH, stack

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
        "--address", default="127.0.0.1", show_default=True, help="0.0.0.0 exposes it to the network."
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
)
openai_options = stack(
    click.option("--openai", is_flag=True, help="Also an OpenAI-compatible endpoint."),
    click.option("--openai-port", type=int, default=8004, show_default=True, help="0 chooses a free one."),
    click.option(
        "--api-key-file",
        type=PATH,
        help="Keys of the OpenAI endpoint, one per line; needed on another address than loopback.",
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
