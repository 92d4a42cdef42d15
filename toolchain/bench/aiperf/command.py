"""aiperf as a process: its command line, its environment, its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolchain.bench.arrivals import parse_arrival
from toolchain.bench.settings import Settings
from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress

CODE = "TC-713"
RECORDS = "profile_export.jsonl"
START_S = 180.0
"""It starts eight processes, each of which imports for seconds."""
STOP_S = 15.0
POLL_S = 0.25
KEY_VARIABLES = ("TOOLCHAIN_API_KEY", "OPENAI_API_KEY")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""With either, aiperf 0.13.0 takes the tokenizer's directory for the name of a cached repository and fails."""
START = (
    "import os, sys; from aiperf.cli import app; key = os.environ.pop('AIPERF_KEY', ''); "
    "sys.argv = ['aiperf', *sys.argv[1:], *(['--api-key', key] if key else [])]; sys.exit(app())"
)
"""Its command, with the API key from the environment: an argument could be read by every user of the machine."""
FAILURE = re.compile(r'"error":(\{.*\})')
"""In a line of its records."""
TRITON_PATH = "/v2/models/{model}/generate_stream"
ENDPOINT_TYPES = {"completions": "completions", "chat": "chat"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One aiperf process: one level of one repeat."""

    python: Path
    url: str
    """http://host:port of Triton's HTTP endpoint, or of an OpenAI server."""
    target: str
    model: str
    tokenizer_dir: Path
    settings: Settings
    concurrency: int | None
    rate: float | None
    requests: int
    """All of them, measured or not."""
    payloads: Path
    artifacts: Path

    @property
    def limit_s(self) -> float:
        """Longer it cannot take: every request as long as it may, one after the other for each user."""
        users = self.concurrency or self.settings.max_outstanding
        turns = -(-self.requests // users)
        waiting = self.requests / self.rate if self.rate else 0.0
        return START_S + waiting + turns * self.settings.timeout_s


def arguments(run: Run) -> list[str]:
    """What follows ``aiperf`` on the command line. Without telemetry: nothing but the load competes with the server."""
    words = ["profile", "--model", run.model, "--url", run.url, "--streaming", *_endpoint(run), *_load(run)]
    words += ["--input-file", str(run.payloads), "--custom-dataset-type", "inputs_json"]
    words += ["--dataset-sampling-strategy", "sequential", "--random-seed", str(run.settings.seed)]
    words += ["--tokenizer", str(run.tokenizer_dir), "--artifact-dir", str(run.artifacts)]
    words += ["--request-timeout-seconds", f"{run.settings.timeout_s:g}", "--export-level", "records"]
    return [*words, "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"]


def _endpoint(run: Run) -> list[str]:
    if run.target == "openai":
        return ["--endpoint-type", ENDPOINT_TYPES[run.settings.endpoint]]
    path = TRITON_PATH.format(model=run.model)
    words = ["--endpoint-type", "raw", "--custom-endpoint", path]
    return [*words, "--extra-inputs", "response_field:text_output"]


def _load(run: Run) -> list[str]:
    words = ["--request-count", str(run.requests)]
    if run.rate is None:
        return [*words, "--concurrency", str(run.concurrency)]
    words += ["--request-rate", f"{run.rate:g}", "--concurrency", str(run.settings.max_outstanding)]
    cv = parse_arrival(run.settings.arrival).cv
    kind = {0.0: "constant", 1.0: "poisson"}.get(cv, "gamma")
    words += ["--arrival-pattern", kind]
    if kind == "gamma":
        words += ["--arrival-smoothness", f"{1 / cv**2:g}"]  # the shape of the distribution
    return words


def execute(run: Run, progress: Progress, *, description: str) -> None:
    """Run it to its end. ToolchainError TC-713 when it fails or takes longer than it can; nothing of it is left."""
    log = run.artifacts.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(run.python), "-c", START, *arguments(run)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            cwd=run.artifacts.parent,
            start_new_session=True,
        )
        try:
            for _ in progress.track(_ended(process, run), description=description, total=run.requests):
                pass
        finally:
            _stop(process)
    if process.returncode:
        raise ToolchainError(
            f"aiperf ended with status {process.returncode}: {_failures(run) or _last_words(log)}",
            hint="check that the server answers at this address; aiperf's own words are above",
            code=CODE,
        )


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in (*OFFLINE, *KEY_VARIABLES)}
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")
    return {**kept, "TOKENIZERS_PARALLELISM": "false", **({"AIPERF_KEY": key} if key else {})}


def _ended(process: subprocess.Popen[bytes], run: Run) -> Iterator[int]:
    """One item for each request that has ended, as far as aiperf has written it; all when it has ended."""
    deadline = time.monotonic() + run.limit_s
    said = 0
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise ToolchainError(
                f"aiperf did not end within {run.limit_s:.0f} s",
                hint="the server may have stopped answering; a longer answer needs a longer --timeout",
                code=CODE,
            )
        time.sleep(POLL_S)
        written = min(run.requests, _lines(run.artifacts / RECORDS))
        for _ in range(said, written):
            yield 1
        said = max(said, written)
    for _ in range(said, run.requests):
        yield 1


def _lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as handle:
        return sum(1 for _ in handle)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Where it did not end well: its whole session, because its workers are processes of their own."""
    if process.poll() == 0:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_S)


def _failures(run: Run) -> str:
    """It fails when every request has failed; what they said is in its records. Nothing where there are none."""
    path = run.artifacts / RECORDS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = Counter(match.group(1) for line in lines if (match := FAILURE.search(line)))
    return "; ".join(f"{count} times {words}" for words, count in found.most_common(2))[:1500]


def _last_words(log: Path) -> str:
    """The reason in its log: the first error, else the last lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if " ERROR " in line or "Reason:" in line or "rror:" in line]
    found = errors[:2] or lines[-3:]
    return " / ".join(" ".join(line.strip(" │").split()) for line in found)[:1500] or "it wrote no log"
