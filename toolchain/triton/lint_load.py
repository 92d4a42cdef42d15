"""The models of a repository on a real tritonserver: each is loaded by itself and asked once."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from toolchain.core.errors import ToolchainError
from toolchain.core.findings import Finding
from toolchain.core.progress import Progress, Silent
from toolchain.triton.load import load_model
from toolchain.triton.rules.backends import ENSEMBLE
from toolchain.triton.rules.endpoints import Endpoints
from toolchain.triton.rules.rule import Rule
from toolchain.triton.server import TritonServer
from toolchain.triton.zero_request import NotAskable, ask

State = Literal["answered", "loaded", "refused", "not checked"]
REFUSED = Rule(
    code="TC-657", says="a real tritonserver does not load the model", server="what it said is shown"
)
NO_ANSWER = Rule(
    code="TC-657",
    severity="warning",
    says="a model that is loaded and answers a request of zeros, or none, with an error",
    server="what it said is shown",
    hint="it may be right to refuse such a request",
)
NOT_CHECKED = Rule(
    code="TC-658",
    severity="warning",
    says="a model that could not be loaded for want of a backend, an agent or a GPU, or for which no request can be "
    "made up",
    server="is not the one that will serve it",
    hint="try it on the server that will serve it",
)
RULES = (REFUSED, NO_ANSWER, NOT_CHECKED)
LACKING = {
    r"unable to find backend library for backend '([^']*)'": "this server has no backend {0}",
    r"unable to find 'libtritonrepoagent_(\w+)\.so'": "this server has no repository agent {0}",
    r"no GPUs are available": "this machine has no GPU",
    r"invalid or unsupported gpu id (\d+)": "this machine has no GPU {0}",
}
"""What tritonserver says -> what is missing here rather than wrong there."""
MESSAGE_LENGTH = 600
ENDS_WITHIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    model: str
    state: State
    said: str
    """The server's message, or how it was asked."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class BareServer(TritonServer):
    """A server that is up as soon as it listens: no model is loaded yet."""

    def __init__(self, repository: Path, *, log_file: Path, progress: Progress) -> None:
        super().__init__(repository, log_file=log_file, ready_timeout_s=60, progress=progress)
        self.models = ()

    def probe(self, *, timeout_s: float) -> None:
        """There is nothing to ask."""


def load_repository(
    repository: Path,
    models: Sequence[Endpoints],
    broken: frozenset[str],
    *,
    timeout_s: float = 1800.0,
    progress: Progress | None = None,
) -> tuple[list[Outcome], list[Finding]]:
    """What a real server does with each of ``models`` but those in ``broken``, whose faults are known.

    ``repository`` may be the directory of one model. ``timeout_s``: for loading one model. Raises ToolchainError where
    no tritonserver is installed or it does not start.
    """
    progress = progress or Silent()
    ordered = sorted(
        (item for item in models if item.model not in broken), key=lambda item: item.backend == ENSEMBLE
    )
    outcomes: list[Outcome] = []
    with _repository_of(repository, [item.model for item in models]) as served:
        waiting = [item.model for item in ordered]
        while waiting:
            outcomes += _until_it_ends(served, waiting, timeout_s, progress)
    return outcomes, list(_findings(outcomes))


def _until_it_ends(
    served: Path, waiting: list[str], timeout_s: float, progress: Progress
) -> Iterator[Outcome]:
    """Outcomes of one server's life; takes the models that were tried out of ``waiting``."""
    server = BareServer(served, log_file=served.parent / "tritonserver.log", progress=progress)
    server.start()
    first = True
    try:
        while waiting:
            progress.note(f"loading {waiting[0]}")
            outcome = _try(server, waiting[0], timeout_s)
            ended = server.process is None or server.process.poll() is not None
            if ended and not first:
                return  # perhaps an earlier model's doing: once more, on a server of its own
            waiting.pop(0)
            yield outcome
            if ended:
                return
            first = False
    finally:
        server.kill()


@contextlib.contextmanager
def _repository_of(repository: Path, models: list[str]) -> Iterator[Path]:
    """A directory with links to the models: one model is a repository then, and nothing is written beside it."""
    with tempfile.TemporaryDirectory(prefix="toolchain-lint-") as directory:
        served = Path(directory) / "repository"
        served.mkdir()
        found = repository.resolve()
        alone = models == [found.name] and not (found / found.name).is_dir()
        for name in models:
            (served / name).symlink_to(found if alone else found / name, target_is_directory=True)
        yield served


def _try(server: TritonServer, model: str, timeout_s: float) -> Outcome:
    before = server.log_file.stat().st_size
    try:
        load_model(server.grpc_url, model, timeout_s=timeout_s)
    except ToolchainError as error:
        said = _said(server, model, before) or error.message
        if _has_ended(server):
            said = f"tritonserver ended while loading it; {said}"
        for pattern, text in LACKING.items():
            if match := re.search(pattern, f"{said} {error.message}"):
                return Outcome(model=model, state="not checked", said=text.format(*match.groups()))
        return Outcome(model=model, state="refused", said=said[:MESSAGE_LENGTH])
    try:
        return Outcome(model=model, state="answered", said=ask(server.grpc_url, model))
    except NotAskable as error:
        return Outcome(model=model, state="not checked", said=f"loaded, not asked: {error.message}")
    except ToolchainError as error:
        state: State = "refused" if _has_ended(server) else "loaded"
        said = (
            f"tritonserver ended while it was asked; {error.message}" if state == "refused" else error.message
        )
        return Outcome(model=model, state=state, said=said[:MESSAGE_LENGTH])


def _has_ended(server: TritonServer) -> bool:
    """Connections break a moment before the process is gone."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return server.process is None or server.process.wait(ENDS_WITHIN_S) is not None
    return False


def _said(server: TritonServer, model: str, before: int) -> str:
    """The errors about ``model`` in the log behind byte ``before``, and those of the parser, which name none."""
    with server.log_file.open("rb") as log:
        log.seek(before)
        lines = log.read().decode("utf-8", errors="replace").splitlines()
    told = [line for line in lines if re.match(r"E\d{4} ", line) or "Error parsing text-format" in line]
    own = [line for line in told if model in line or "Error parsing" in line]
    texts = [line.rpartition("] ")[2].strip('" ').replace(f"{server.repository}/", "") for line in own]
    final = [text for text in texts if text.startswith(("failed to load", "Poll failed", "Error parsing"))]
    return "; ".join(final or texts).replace("\\n", " ")


def _findings(outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    for item in outcomes:
        if item.state == "refused":
            yield REFUSED.found(item.model, f"not loaded: {item.said}")
        elif item.state == "loaded":
            yield NO_ANSWER.found(item.model, f"loaded, and answers with an error: {item.said}")
        elif item.state == "not checked":
            yield NOT_CHECKED.found(item.model, item.said)
