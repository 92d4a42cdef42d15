"""Publishing: model card, SBOM, upload."""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "TC-901": (
        "The directory is no engine that can be published",
        "Publishing takes a finished engine: engine.json, plan.json and checkpoint/. `toolchain engine MODEL` makes "
        "one.",
    ),
    "TC-902": (
        "The engine must not be published as it is",
        "It failed a gate or its audit, was never audited, or its files are not those that engine.json describes. Run "
        "`toolchain engine` again; --force publishes all the same, and the card says so.",
    ),
    "TC-903": (
        "A fact is missing that readers of a model card look for",
        "A warning. Licence and base model are taken from the source's own card; --license and --base-model state "
        "them.",
    ),
    "TC-904": (
        "The hub refuses the upload",
        "401: log in with `hf auth login`, or set HF_TOKEN. 403: the token may not write to that repository. 404: the "
        "owner or the revision does not exist.",
    ),
    "TC-905": (
        "The hub cannot be reached",
        "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE. Run the same command again: files that arrived are not "
        "sent twice.",
    ),
    "TC-906": (
        "A repository name cannot be used",
        "It is `owner/name`: letters, digits, `-`, `_` and `.`, at most 96 characters.",
    ),
}
