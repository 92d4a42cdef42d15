"""What was quantized to what, as rows: one for each kind of part in each format."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from toolchain.formats import FORMATS
from toolchain.plan.types import SOURCE_DTYPE

TITLES = {
    "routed_expert": "routed experts",
    "shared_expert": "shared experts",
    "dense_mlp": "dense MLP",
    "attention": "attention",
    "router": "routers and gates",
    "norm": "norms",
    "embedding": "embeddings",
    "lm_head": "output head",
    "other": "everything else",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    title: str
    format: str
    """``nvfp4 (NVFP4)``, or ``source dtype``."""
    layers: str
    """``0-3, 7``; empty for what belongs to no layer."""
    share: float
    """Of all parameters, 0 to 1."""


def parts_of(plan: dict[str, Any]) -> list[Part]:
    """Rows in the order of the plan; quantized parts first. Empty without assignments."""
    assignments = plan.get("assignments", ())
    total = sum(item["parameters"] for item in assignments) or 1
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for item in assignments:
        grouped[item["role"], item["format"]].append(item)
    rows = [
        Part(
            title=TITLES.get(role, role.replace("_", " ")),
            format=format_title(name),
            layers=ranges({item["layer"] for item in items if item["layer"] is not None}),
            share=sum(item["parameters"] for item in items) / total,
        )
        for (role, name), items in grouped.items()
    ]
    return sorted(rows, key=lambda row: row.format == format_title(SOURCE_DTYPE))


def format_title(name: str) -> str:
    return "source dtype" if name == SOURCE_DTYPE else f"{name} ({algo_of(name)})"


def algo_of(name: str) -> str:
    """quant_algo of a format; its own name where this version does not know it."""
    return next((item.quant_algo for item in FORMATS if item.name == name), name)


def ranges(numbers: set[int]) -> str:
    """``{0, 1, 2, 5}`` -> ``0-2, 5``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
