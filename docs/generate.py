"""Write docs/cli.md from the help texts; ``--check`` fails when it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from toolchain.cli.main import COMMANDS, cli

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "# Command line\n\nGenerated from the help texts by `make docs`; `make check` fails when it is stale.\n"
)


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


def main() -> int:
    path = ROOT / "docs" / "cli.md"
    wanted = cli_reference()
    if "--check" in sys.argv:
        if not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            sys.stderr.write(f"{path.relative_to(ROOT)} is stale: run `make docs`\n")
            return 1
        return 0
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
