"""All rules in the order of the README's table, and that table."""

from __future__ import annotations

from toolchain.triton.rules import (
    backends,
    batching,
    ensembles,
    flow,
    inflight,
    instances,
    llmapi,
    local,
    model,
    parameters,
    repository,
    tensors,
    versions,
    warmup,
)
from toolchain.triton.rules.rule import Rule

READING = (model.PARSE, model.ENCODING, model.UNREADABLE, model.UNFILLED, model.UNFILLED_OPTIONAL)
NAME = Rule(
    code="TC-605",
    says="config.pbtxt's name is not that of its directory",
    server="refuses",
    hint="Triton goes by the directory: rename one, or leave the name out",
)
SUBJECTS: dict[str, tuple[Rule, ...]] = {
    "repository": repository.RULES,
    "reading": READING,
    "model": (NAME, *backends.RULES),
    "versions": versions.RULES,
    "tensors": tensors.RULES,
    "batching": batching.RULES,
    "instances": instances.RULES,
    "warm-up": warmup.RULES,
    "parameters": parameters.RULES,
    "ensembles": (*ensembles.RULES, *flow.RULES),
    "layout `local`": local.RULES,
    "layout `llmapi`": llmapi.RULES,
    "layout `inflight_batcher_llm`": inflight.RULES,
}
"""Subject -> its rules."""


def markdown() -> str:
    """The table of the README in this directory."""
    lines = ["| subject | code | | what is reported | tritonserver 2.51 |", "|---|---|---|---|---|"]
    for subject, rules in SUBJECTS.items():
        for rule in rules:
            says, server = (text.replace("|", "\\|") for text in (rule.says, rule.server))
            lines.append(f"| {subject} | {rule.code} | {rule.severity} | {says} | {server} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown() + "\n")
