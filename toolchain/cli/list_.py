"""toolchain list formats|recipes|families|targets|gpus"""

from __future__ import annotations

from typing import Any

import click

from toolchain.cli.options import json_option
from toolchain.cli.output import emit, table
from toolchain.core.gpus import GPUS
from toolchain.families import FAMILIES
from toolchain.formats import FORMATS
from toolchain.recipes import INGREDIENTS
from toolchain.targets import TARGETS


def _formats() -> list[dict[str, Any]]:
    return [
        {
            "name": item.name,
            "bits": round(item.bits_per_weight(), 3),
            "activations": item.activation,
            "quant_algo": item.quant_algo,
            "title": item.title,
        }
        for item in FORMATS
    ]


def _families() -> list[dict[str, Any]]:
    return [
        {
            "name": item.name,
            "model_types": ", ".join(item.model_types),
            "moe": bool(item.num_experts_key),
            "quantized": ", ".join(item.formats) if item.formats else "every format",
        }
        for item in FAMILIES
    ]


def _targets() -> list[dict[str, Any]]:
    return [{"name": item.name, "version": item.default_version, "title": item.title} for item in TARGETS]


def _gpus() -> list[dict[str, Any]]:
    return [
        {
            "name": gpu.name,
            "sm": gpu.sm,
            "memory_gib": gpu.memory_gib,
            "bandwidth_gb_s": gpu.bandwidth_gb_s,
            "title": gpu.title,
            "source": gpu.source,
        }
        for gpu in GPUS
    ]


def _recipes() -> list[dict[str, Any]]:
    return [
        {
            "name": item.name,
            "decides": item.axis,
            "formats": ", ".join(item.formats),
            "data": "calibration" if item.needs_data else "none",
            "title": item.title,
        }
        for item in INGREDIENTS
    ]


KINDS = {"formats": _formats, "recipes": _recipes, "families": _families, "targets": _targets, "gpus": _gpus}


@click.command(name="list")
@click.argument("kind", type=click.Choice(list(KINDS)))
@json_option
def command(kind: str, as_json: bool) -> None:
    """List formats, recipes, families, targets or gpus."""
    rows = KINDS[kind]()
    emit(rows, as_json, table(list(rows[0]), [list(row.values()) for row in rows]))
