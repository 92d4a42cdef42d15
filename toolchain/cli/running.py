"""How a model is computed by the local runtime: options of commands that run it, here or in an engine process."""

from __future__ import annotations

import click

from toolchain.cli.options import stack

kernel_options = stack(
    click.option(
        "--kernels",
        type=click.Choice(["auto", "off"]),
        default="auto",
        show_default=True,
        help="Target local; auto: weights stay packed, with fused kernels, where an NVIDIA GPU can; off: decoded.",
    ),
    click.option(
        "--kv-cache",
        type=click.Choice(["auto", "bf16", "fp8"]),
        default="auto",
        show_default=True,
        help="Target local, on a GPU; auto: what the checkpoint was made for.",
    ),
    click.option(
        "--kv-layout",
        type=click.Choice(["paged", "static"]),
        default="paged",
        show_default=True,
        help="Target local, on a GPU; static: memory of the longest request for every one.",
    ),
)
