"""Options of commands that run a model in this process."""

from __future__ import annotations

import click

from toolchain.cli.options import stack

kernel_options = stack(
    click.option(
        "--kernels",
        type=click.Choice(["auto", "off"]),
        default="auto",
        show_default=True,
        help="auto: weights stay packed, and fused kernels compute on them, where an NVIDIA GPU can; off: decoded.",
    ),
    click.option(
        "--kv-cache",
        type=click.Choice(["auto", "bf16", "fp8"]),
        default="auto",
        show_default=True,
        help="On a GPU; auto: what the checkpoint was made for.",
    ),
    click.option(
        "--kv-layout",
        type=click.Choice(["paged", "static"]),
        default="paged",
        show_default=True,
        help="On a GPU; static: memory of the longest request for every one.",
    ),
)
