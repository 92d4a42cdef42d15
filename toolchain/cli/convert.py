"""toolchain convert"""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli.options import PATH, dry_run_option, force_option, json_option
from toolchain.cli.output import Terminal, emit, facts


@click.command(name="convert")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--output", type=PATH, required=True, help="Directory of the converted checkpoint.")
@click.option(
    "--exact",
    is_flag=True,
    help="Refuse when 1 / global_scale, rounded in float32, changes a decoded BF16 value.",
)
@dry_run_option
@force_option
@json_option
def command(directory: Path, output: Path, exact: bool, dry_run: bool, force: bool, as_json: bool) -> None:
    """Write a compressed-tensors checkpoint (llm-compressor) in ModelOpt's unified layout.

    NVFP4, NVFP4A16, FP8, FP8_DYNAMIC, FP8_BLOCK and W4A16. Codes and scales are kept; the result is audited.
    """
    from toolchain.checkpoint.convert import convert
    from toolchain.core.files import refuse_occupied
    from toolchain.runtime.location import locate

    source = locate(directory).checkpoint
    refuse_occupied(output, force=force)
    done = convert(source, output, exact=exact, force=force, dry_run=dry_run, progress=Terminal())
    found = done.exactness
    lines = [str(finding) for finding in done.verdict.findings]
    text = facts(
        [
            ("checkpoint", output if not dry_run else f"{output} (not written: --dry-run)"),
            ("quant_algo", done.quant_algo),
            ("matrices", found.matrices),
            ("decoded values equal", f"{found.exact} in float32, {found.same_bf16} in BF16"),
            (
                "largest difference",
                f"{found.largest_difference:.1e} relative" if found.largest_difference else "none",
            ),
            ("next", f"toolchain verify {output} --target trtllm"),
        ]
    )
    emit(done.to_json(), as_json, "\n".join([*lines, text]))
