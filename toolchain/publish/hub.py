"""The upload: one commit to a repository of the Hugging Face hub.

The library resumes and retries: files that arrived are known by their hash and not sent twice. The token is the
library's (``hf auth login`` or HF_TOKEN); it is read by nobody else, and never stands in a message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress, Silent
from toolchain.publish.publication import Publication

WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Files of an older upload that runtimes would load besides the new ones."""
REASONS = {
    401: ("the hub does not know who you are", "log in with `hf auth login`, or set HF_TOKEN"),
    403: ("the token may not write there", "use a token with write permission for that owner"),
    404: ("there is no such owner, repository or revision", "check the name, and whether it is private"),
    409: ("somebody else changed the repository meanwhile", "run the same command again"),
    429: ("the hub asks for fewer requests", "wait, then run the same command again: nothing is sent twice"),
}
"""HTTP status -> what it means here, what to do."""


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    url: str
    commit: str
    deleted: tuple[str, ...]
    """Weights of an older upload that are no part of this one."""


def upload(
    publication: Publication,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    progress: Progress | None = None,
) -> Uploaded:
    """Create the repository (and the branch ``revision``) where they do not exist, and commit all files at once.

    ``private`` decides for a new repository only. ToolchainError TC-904 for what the hub refuses, TC-905 when it cannot
    be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo_id = HfApi(library_name="toolchain"), publication.repo_id
    note = (progress or Silent()).note
    with _told(repo_id):
        # None, not False: an organization may make new repositories private by itself.
        created = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision and revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=revision)
        ours = {item.path for item in publication.items}
        stale = tuple(sorted(name for name in present if name.endswith(WEIGHTS) and name not in ours))
        adding = [
            CommitOperationAdd(path_in_repo=item.path, path_or_fileobj=item.content)
            for item in publication.items
        ]
        note(f"uploading {len(adding)} files to {created}")
        commit = api.create_commit(
            repo_id,
            [*adding, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message=message or "Upload quantized checkpoint and model card",
            revision=revision,
        )
    return Uploaded(url=str(created), commit=str(commit.oid), deleted=stale)


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """What the library raises becomes one clear error."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what, todo = REASONS.get(
            status, (_first_line(error), "run the same command again: nothing is sent twice")
        )
        raise ToolchainError(
            f"{repo_id} was not uploaded: HTTP {status}, {what}", hint=todo, code="TC-904"
        ) from error
    except Exception as error:
        # httpx, the library's offline switch and its transfer backend raise errors of their own.
        raise ToolchainError(
            f"{repo_id} was not uploaded: {type(error).__name__}: {_first_line(error)}",
            hint="check the network, HF_ENDPOINT and HF_HUB_OFFLINE; run the same command again: nothing is sent twice",
            code="TC-905",
        ) from error


def _first_line(error: Any) -> str:
    from huggingface_hub import get_token

    line = next(iter(str(error).strip().splitlines()), "no reason given")
    token = get_token()
    return line.replace(token, "***") if token else line
