"""The model card of an engine: README.md in the format of the hub, with the numbers that were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain import __version__
from toolchain.checkpoint.quant_config import MIXED
from toolchain.core.files import read_json
from toolchain.evaluate.gates import FILE as GATES_FILE
from toolchain.evaluate.gates import checkpoint_identity
from toolchain.evaluate.harness.kept import read_tasks
from toolchain.publish import figures
from toolchain.publish.names import bare, bare_command
from toolchain.publish.parts import algo_of, parts_of
from toolchain.publish.release import Release
from toolchain.publish.serving import servings

TEMPLATES = Path(__file__).parent / "templates"
LIBRARY = "Model Optimizer"
"""``library_name`` of NVIDIA's own quantized checkpoints: transformers cannot read these files back."""


def render_card(release: Release, repo_id: str, *, forced: tuple[str, ...] = ()) -> str:
    """README.md of ``release`` in the repository ``repo_id``.

    ``forced``: why it should not have been published; stands at its head.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    body = environment.get_template("card.md.jinja").render(_context(release, repo_id, forced))
    card = ModelCard(f"---\n{_front_matter(release).to_yaml()}\n---\n\n{body}")
    return str(card.content)


def _front_matter(release: Release) -> Any:
    from huggingface_hub import ModelCardData

    source = release.source
    return ModelCardData(
        base_model=source.hub_id,
        base_model_relation="quantized" if source.hub_id else None,
        language=list(source.language) or None,
        library_name=LIBRARY,
        license=source.license,
        license_name=source.license_name,
        license_link=source.license_link,
        pipeline_tag=source.pipeline_tag or "text-generation",
        quantized_by="toolchain",
        tags=_tags(release),
    )


def _tags(release: Release) -> list[str]:
    manifest = release.manifest
    names = [
        "quantized",
        "modelopt",
        str(manifest.get("quant_algo", "")).lower(),
        *manifest.get("formats", ()),
    ]
    if release.is_moe:
        names.append("moe")
    if manifest.get("target") == "trtllm":
        names.append("tensorrt-llm")
    return [name for name in dict.fromkeys(names) if name]


def _context(release: Release, repo_id: str, forced: tuple[str, ...]) -> dict[str, Any]:
    metrics, manifest = release.metrics or {}, release.manifest
    formats = manifest.get("formats") or [manifest.get("format")]
    algos = frozenset(map(algo_of, formats)) if manifest.get("quant_algo") == MIXED else None
    calibration = release.quantization.get("calibration")
    return {
        "release": release,
        "repo_id": repo_id,
        "forced": forced,
        "parts": parts_of(release.plan),
        "stored_bytes": sum(file.stat().st_size for file in release.shards),
        "source_bytes": release.plan.get("estimates", {}).get("source_bytes"),
        "bits": ((release.verdict or {}).get("facts") or {}).get("effective_bits"),
        "recipe": release.plan.get("recipe", "max"),
        "size": figures.size,
        "quality": figures.quality(release.metrics),
        "data": metrics.get("data") or {},
        "data_name": bare((metrics.get("data") or {}).get("source")),
        "emulation": metrics.get("emulation", "target"),
        "gates": _gates(release),
        "tasks": figures.tasks(read_tasks(release.directory) or metrics.get("tasks")),
        "bench": [(item, rows) for item in release.bench[-1:] if (rows := figures.speed(item))],
        "verdict": release.verdict,
        "calibration": calibration,
        "calibration_name": bare((calibration or {}).get("source")),
        "training": manifest.get("training"),
        "training_name": bare(((manifest.get("training") or {}).get("data") or {}).get("sources")),
        "starved": release.quantization.get("starved_experts") or [],
        "remedy": release.quantization.get("starved_remedy"),
        "servings": servings(release, repo_id, algos or frozenset({str(manifest.get("quant_algo"))})),
        "command": bare_command(manifest.get("command", ())),
        "version": __version__,
    }


def _gates(release: Release) -> list[dict[str, Any]]:
    """Limits that the engine was held to: those of gates.json where it speaks of these bytes."""
    path = release.directory / GATES_FILE
    marked = read_json(path) if path.is_file() else {}
    if marked.get("checkpoint") == checkpoint_identity(release.manifest["files"]):
        return list(marked.get("gates", ()))
    return list((release.metrics or {}).get("gates") or ())


def _cell(value: Any) -> str:
    """Text inside a table of Markdown."""
    return str(value).replace("|", "\\|").replace("\n", " ")
