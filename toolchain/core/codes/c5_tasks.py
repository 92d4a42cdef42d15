"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-540": (
        "lm-evaluation-harness is not installed",
        "It brings about 35 packages, so it does not come with the rest: `make lm-eval` puts it beside the "
        "environment, `pip install 'toolchain[lm-eval]'` into it.",
    ),
    "TC-541": (
        "A task is unknown or its definition cannot be read",
        "`lm-eval ls tasks` lists the tasks of lm-evaluation-harness; --tasks-path adds a directory with YAML files "
        "of your own.",
    ),
    "TC-542": (
        "A task cannot be run",
        "The message says what it raised. Tasks read their data from the hub: check the network and "
        "HF_DATASETS_OFFLINE; some need further packages.",
    ),
    "TC-543": (
        "A task needs longer sequences than the engine takes",
        "What is scored must fit in max_seq_len, and an answer must leave room for its prompt: build the engine with a "
        "larger --max-seq-len, or leave the task out.",
    ),
}
