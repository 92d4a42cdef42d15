"""Write docs/cli.md and the generated tables of README.md; ``--check`` fails when one of them is stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
from accuracy_table import accuracy
from matrix_table import matrix

from toolchain.cli.main import COMMANDS, cli
from toolchain.formats import FORMATS
from toolchain.targets import TRTLLM, SupportRow, support_table

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "# Command line\n\nGenerated from the help texts by `make docs`; `make check` fails when it is stale.\n"
)
GPUS = ("a100", "l40s", "h100", "h200", "b200", "b300", "rtx5090")


def sections(command: click.Command, names: list[str]) -> list[str]:
    """Markdown of one command's help and of its subcommands'."""
    context = click.Context(command, info_name=" ".join(names), terminal_width=100, max_content_width=100)
    context.help_option_names = ["-h", "--help"]
    text = [f"## {' '.join(names)}\n\n```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group) and command is not cli:
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                text += sections(found, [*names, name])
    return text


def cli_reference() -> str:
    """docs/cli.md."""
    parts = [HEADER, *sections(cli, ["toolchain"])]
    context = click.Context(cli, info_name="toolchain")
    for name in COMMANDS:
        found = cli.get_command(context, name)
        if found is not None:
            parts += sections(found, ["toolchain", name])
    return "\n".join(parts)


def support() -> str:
    """Formats x targets x GPUs: target trtllm in its default and its newest release; local runs everything anywhere."""
    lines = []
    for version in (TRTLLM.default_version, TRTLLM.versions[-1]):
        rows = {
            (row.format, row.model, row.gpu): row
            for row in support_table(version=version)
            if row.target == "trtllm"
        }
        lines += [f"| TensorRT-LLM {version} | {' | '.join(GPUS)} |", f"|---|{'---|' * len(GPUS)}"]
        nowhere = []
        for item in FORMATS:
            for model in ("moe", "dense"):
                cells = [_cell(rows[item.name, model, gpu]) for gpu in GPUS]
                if set(cells) == {"-"}:
                    nowhere.append(f"{item.name} ({model})")
                    continue
                lines.append(
                    f"| {item.name} ({item.bits_per_weight():.2f} bits), {model} | {' | '.join(cells)} |"
                )
        lines += ["", f"On none of these GPUs: {', '.join(nowhere)}."]
        lines.append("")
    lines.append(
        "The word in a cell is the `moe_config.backend` that is written; *limited* runs with a note, `-` is refused at "
        "plan time with the nearest thing that works (`toolchain support` has notes and evidence). Target `local` runs "
        "every format on any CPU or GPU with PyTorch, with the exact values of the format, at the speed of "
        "PyTorch; on NVIDIA GPUs since Ampere FP8, NVFP4, MXFP4 and INT4 weights "
        "stay packed and run through fused kernels (toolchain/kernels), which have not met a GPU yet."
    )
    return "\n".join(lines)


def _cell(row: SupportRow) -> str:
    if row.state == "no":
        return "-"
    return " ".join(
        part for part in (row.backend or "yes", "(limited)" if row.state == "limited" else "") if part
    )


def readme() -> str:
    """README.md with its generated parts renewed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    streaming = (ROOT / "benchmarks" / "results" / "streaming.md").read_text(encoding="utf-8").rstrip()
    tables = (
        ("support", support()),
        ("matrix", matrix()),
        ("accuracy", accuracy()),
        ("streaming", streaming),
    )
    for name, made in tables:
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- /generated -->)"
        text, replaced = re.subn(
            pattern, lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text, flags=re.DOTALL
        )
        if replaced != 1:
            raise ValueError(f"README.md has {replaced} places for the table {name}, expected 1")
    return text


def main() -> int:
    wanted = {ROOT / "docs" / "cli.md": cli_reference(), ROOT / "README.md": readme()}
    for path, text in wanted.items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"{path.relative_to(ROOT)} is stale: run `make docs`\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
