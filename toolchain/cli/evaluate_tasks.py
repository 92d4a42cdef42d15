"""Options of ``toolchain evaluate`` for tasks of lm-evaluation-harness, and what is printed of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from toolchain.cli.options import PATH, stack
from toolchain.cli.output import Terminal, table

_options = stack(
    click.option(
        "--tasks",
        metavar="A,B",
        help="Tasks of lm-evaluation-harness to run on the local runtime (`make lm-eval` installs it). Kept in the "
        "engine's tasks.json.",
    ),
    click.option(
        "--tasks-path", type=PATH, metavar="DIR", help="Directory with YAML files of further tasks."
    ),
    click.option("--limit", type=int, metavar="N", help="Only the first N documents of each task."),
    click.option(
        "--num-fewshot", type=int, metavar="N", help="Examples in the prompt. Default: each task's."
    ),
    click.option("--tasks-chat", is_flag=True, help="Put the prompts of tasks through the chat template."),
    click.option(
        "--tasks-commands",
        is_flag=True,
        help="Run no task: print the commands that run them with TensorRT-LLM.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class AskedTasks:
    names: tuple[str, ...]
    path: Path | None
    limit: int | None
    num_fewshot: int | None
    chat: bool
    commands_only: bool

    def run(self, directory: Path, *, device: str, emulation: str) -> dict[str, Any]:
        """The tasks' document, or the commands alone; kept in the engine's directory when they were run."""
        from toolchain.evaluate.harness.commands import trtllm_commands
        from toolchain.evaluate.harness.kept import keep_tasks
        from toolchain.evaluate.harness.tasks import run_tasks

        asked: dict[str, Any] = {
            "include_path": self.path,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "chat_template": self.chat,
        }
        if self.commands_only:
            return {"commands": trtllm_commands(directory, self.names, **asked)}
        terminal = Terminal()
        document = run_tasks(
            directory, self.names, device=device, emulate=emulation == "target", progress=terminal, **asked
        )
        kept = keep_tasks(directory, document)
        if kept:
            terminal.note(f"kept in {kept}")
        return document


def task_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command gets them as ``tasks: AskedTasks | None``."""

    @_options
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        tasks: str | None,
        tasks_path: Path | None,
        limit: int | None,
        num_fewshot: int | None,
        tasks_chat: bool,
        tasks_commands: bool,
        **options: Any,
    ) -> Any:
        used = {"--tasks-path": tasks_path, "--limit": limit, "--num-fewshot": num_fewshot}
        if tasks is None:
            alone = [name for name, value in used.items() if value is not None]
            if alone or tasks_chat or tasks_commands:
                raise click.UsageError(f"{', '.join(alone) or '--tasks-chat'} needs --tasks")
            return function(*args, tasks=None, **options)
        asked = AskedTasks(
            names=tuple(tasks.split(",")),
            path=tasks_path,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=tasks_chat,
            commands_only=tasks_commands,
        )
        return function(*args, tasks=asked, **options)

    return wrapper


def render_tasks(document: dict[str, Any]) -> str:
    """A table of metrics, and the commands for TensorRT-LLM."""
    rows = [
        (name, metric, f"{found['value']:.4f}", _error(found["stderr"]), task["num_fewshot"], task["samples"])
        for name, task in document.get("results", {}).items()
        for metric, found in task["metrics"].items()
    ]
    parts = [table(("task", "metric", "value", "stderr", "shots", "samples"), rows)] if rows else []
    lines = [f"with {item['tool']}: {item['command']}\n  ({item['note']})" for item in document["commands"]]
    return "\n\n".join([*parts, "The same on TensorRT-LLM:\n" + "\n".join(lines)])


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
