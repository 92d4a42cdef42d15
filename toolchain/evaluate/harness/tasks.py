"""``toolchain evaluate --tasks``: tasks of lm-evaluation-harness on the bytes of an engine or checkpoint."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.evaluate.harness.commands import trtllm_commands
from toolchain.evaluate.harness.library import require_lm_eval
from toolchain.evaluate.harness.results import tell

if TYPE_CHECKING:
    from toolchain.evaluate.harness.adapter import LocalLM

SEED = 1234
"""Of few-shot samples and bootstrap, as in the harness."""


def run_tasks(
    directory: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    device: str = "auto",
    emulate: bool = True,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run ``tasks`` on ``directory`` (engine or checkpoint) and return a JSON-able document (``results.py``).

    ``include_path``: directory with YAML files of further tasks. ``limit``: first documents of each task.
    ``num_fewshot`` None: what each task says. ``emulate``: activations and KV cache as the target GPU sees them.
    ``batch_size`` None: what fits. UsageError TC-541 for unknown tasks, ToolchainError TC-540 without lm_eval, TC-542
    for what a task raises (above all data sets that cannot be read).
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: expected at least 1 document", code="TC-523")
    progress = progress or Silent()
    version = require_lm_eval()
    manager = _manager(include_path, tasks)
    names = check_tasks(manager, tasks)
    settings = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat_template": chat_template,
        "emulation": "target" if emulate else "weights",
        "seed": SEED,
    }
    with _model(directory, device=device, emulate=emulate, batch_size=batch_size, progress=progress) as model:
        if chat_template and not model.tokenizer.chat_template:
            raise UsageError(
                f"the tokenizer of {directory} has no chat template",
                hint="run the tasks without it",
                code="TC-503",
            )
        raw = _evaluate(model, names, manager, limit=limit, num_fewshot=num_fewshot, chat=chat_template)
        if model.truncated:
            progress.note(
                f"{model.truncated} contexts were longer than the engine's {model.max_length} tokens and lost "
                "their beginning"
            )
    commands = trtllm_commands(
        directory,
        names,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        chat_template=chat_template,
    )
    return {
        "harness": {"name": "lm-evaluation-harness", "version": version},
        "checkpoint": str(directory),
        "settings": settings,
        "truncated": model.truncated,
        **tell(raw),
        "commands": commands,
    }


def check_tasks(manager: Any, tasks: Sequence[str]) -> list[str]:
    """``tasks`` without repetitions; UsageError TC-541 names those that do not exist and what is close to them."""
    names = list(dict.fromkeys(name.strip() for name in tasks if name.strip()))
    if not names:
        raise UsageError("no task is named", hint="--tasks gsm8k,arc_easy", code="TC-541")
    known = manager.task_index
    unknown = [name for name in names if name not in known]
    if unknown:
        near = sorted({near for name in unknown for near in difflib.get_close_matches(name, known, n=3)})
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UsageError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}",
            hint=f"{hint}`lm-eval ls tasks` lists them; your own YAML files come by --tasks-path",
            code="TC-541",
        )
    return names


def _manager(include_path: Path | None, tasks: Sequence[str]) -> Any:
    """The harness's index of tasks. Reading its own 10,000 files takes seconds, so not for a user's tasks alone."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    if not include_path.is_dir():
        raise UsageError(f"--tasks-path {include_path} is not a directory", code="TC-541")
    try:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        return own if set(tasks) <= set(own.all_subtasks) else TaskManager(include_path=str(include_path))
    except Exception as error:
        # Whatever is wrong in a user's YAML file: the harness raises parser errors and ValueErrors alike.
        raise UsageError(
            f"the tasks in {include_path} cannot be read: {type(error).__name__}: {error}", code="TC-541"
        ) from error


@contextlib.contextmanager
def _model(
    directory: Path, *, device: str, emulate: bool, batch_size: int | None, progress: Progress
) -> Iterator[LocalLM]:
    from toolchain.evaluate.harness.adapter import LocalLM
    from toolchain.runtime.engine import LocalEngine
    from toolchain.runtime.ways import Way

    progress.note(f"loading {directory}")
    # Decoded: what is judged is the rounding of the target, on any device. Without pages, which scoring never uses.
    way = Way(packed=False, paged=False, kv_in_fp8=False)
    with LocalEngine.load(directory, device=device, emulate_activations=emulate, way=way) as engine:
        yield LocalLM(engine, batch_size=batch_size, progress=progress)


def _evaluate(
    model: LocalLM,
    names: list[str],
    manager: Any,
    *,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    try:
        raw: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=1000,
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
        )
    except ToolchainError:
        raise
    except Exception as error:
        # Tasks run code and read data sets of their own; a user needs the task, the kind and the reason.
        raise ToolchainError(
            f"the tasks {', '.join(names)} cannot be run: {type(error).__name__}: {error}",
            hint="data sets are read from the hub: check the network, HF_DATASETS_OFFLINE, and what the task installs",
            code="TC-542",
        ) from error
    return raw
