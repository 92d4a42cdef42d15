"""toolchain verify"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import ENGINE, json_option
from toolchain.cli.output import Terminal, emit, facts, size, table
from toolchain.core.errors import UsageError


@click.command(name="verify")
@click.argument("directory", metavar="DIR", type=ENGINE)
@click.option(
    "--against",
    metavar="MODEL",
    help="Source model: what is not quantized must be bit-equal to it, what is quantized as near as rounding allows.",
)
@click.option(
    "--trtllm-version",
    metavar="V",
    help="A release of TensorRT-LLM, such as 1.2.1 or 1.4.0rc1, that must be able to load it.",
)
@click.option(
    "--target",
    type=click.Choice(["local", "trtllm"]),
    help="trtllm: the rules of TensorRT-LLM, of its default release unless --trtllm-version names another.",
)
@click.option("--tp", type=int, default=1, show_default=True, help="Ranks of tensor parallelism.")
@click.option("--ep", type=int, default=1, show_default=True, help="Expert parallelism; divides --tp.")
@click.option(
    "--top", type=int, default=10, show_default=True, help="With --against: matrices to list, worst first."
)
@click.option(
    "--manifest",
    is_flag=True,
    help="Only check every byte of an engine against the hashes in its engine.json.",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    directory: Path,
    against: str | None,
    trtllm_version: str | None,
    target: str | None,
    tp: int,
    ep: int,
    top: int,
    manifest: bool,
    as_json: bool,
) -> None:
    """Audit the written bytes of a quantized checkpoint (or of an engine's checkpoint), whoever wrote it.

    ModelOpt's unified layout and compressed-tensors (llm-compressor) are read. Exit status 1 with a list of every
    finding when a rule is broken; `toolchain explain CODE` tells more about each.
    """
    if manifest:
        if against or trtllm_version or target:
            raise UsageError(
                "--manifest compares hashes and does nothing else",
                hint="run `toolchain verify` once with it and once without",
                code="TC-001",
            )
        passed = _check_manifest(directory, as_json)
    else:
        passed = _audit(directory, against, _runtime(trtllm_version, target, tp, ep), top, as_json)
    if not passed:
        ctx.exit(1)


def _check_manifest(directory: Path, as_json: bool) -> bool:
    from toolchain.checkpoint.manifest import check_manifest
    from toolchain.core.findings import errors

    found = check_manifest(directory, progress=Terminal())
    passed = not errors(found)
    value = {
        "directory": str(directory),
        "passed": passed,
        "findings": [finding.to_json() for finding in found],
    }
    verdict = "every recorded byte is as it was made" if passed else "FAILED"
    emit(value, as_json, "\n".join([*(str(item) for item in found), facts([("manifest", verdict)])]))
    return passed


def _runtime(version: str | None, target: str | None, tp: int, ep: int) -> Any:
    """The release whose rules are wanted; None for none."""
    from toolchain.checkpoint.audit.runtime import Runtime
    from toolchain.targets import TRTLLM

    if target == "local" and version:
        raise UsageError(
            "--target local has no rules of TensorRT-LLM", hint="use --target trtllm", code="TC-001"
        )
    if version is None and target != "trtllm":
        if (tp, ep) != (1, 1):
            hint = "add --target trtllm or --trtllm-version"
            raise UsageError("--tp and --ep are for TensorRT-LLM", hint=hint, code="TC-001")
        return None
    return Runtime(version=version or TRTLLM.default_version, tp=tp, ep=ep)


def _audit(directory: Path, against: str | None, target: Any, top: int, as_json: bool) -> bool:
    from toolchain.checkpoint.audit import audit
    from toolchain.models.reader import resolve_model
    from toolchain.runtime.location import locate

    source = resolve_model(against) if against else None
    checkpoint = locate(directory).checkpoint
    verdict = audit(checkpoint, against=source, target=target, top=top, progress=Terminal())
    lines = [str(finding) for finding in verdict.findings]
    counted = verdict.facts | {"bytes": size(verdict.facts["bytes"])} | _zeros(verdict.facts.get("sparsity"))
    if verdict.errors.get("worst"):
        lines += ["", _worst(verdict.errors), ""]
    summary = facts([*counted.items(), ("verdict", "passed" if verdict.passed else "FAILED")])
    emit(verdict.to_json(), as_json, "\n".join([*lines, summary]))
    return verdict.passed


def _zeros(counted: dict[str, Any] | None) -> dict[str, str]:
    """The count of groups in words; nothing of a dense checkpoint."""
    if counted is None:
        return {}
    said = f"{counted['sparse_groups']:,} of {counted['groups']:,} groups ({counted['share']:.2%})"
    return {"sparsity": f"{counted['pattern']}: {said} of {counted['matrices']} matrices"}


def _worst(errors: dict[str, Any]) -> str:
    """Relative errors per format, then the matrices that lost most."""
    formats = table(
        ("format", "matrices", "median error", "largest", "rounding reaches"),
        (
            (
                name,
                found["matrices"],
                f"{found['median_relative_error']:.4f}",
                f"{found['max_relative_error']:.4f}",
                f"{found['max_bound']:.4f}",
            )
            for name, found in errors["by_format"].items()
        ),
    )
    worst = table(
        ("error", "rounding reaches", "worst block", "at row, column", "matrix"),
        (
            (
                f"{item['relative_error']:.4f}",
                f"{item['rounding_bound']:.4f}",
                f"{item['worst_block']:.3f}",
                "{}, {}".format(*item["worst_block_at"]),
                item["name"],
            )
            for item in errors["worst"]
        ),
    )
    return f"{formats}\n\n{worst}"
