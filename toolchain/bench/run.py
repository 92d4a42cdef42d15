"""``toolchain bench``: a running server under load at several concurrencies."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolchain.bench.environment import describe_environment
from toolchain.bench.load import Load, run_load
from toolchain.bench.prompts import TokenCounter, make_prompts
from toolchain.bench.records import Measured
from toolchain.bench.statistics import summary
from toolchain.bench.types import BenchResult, Level, Settings
from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.triton.contract import MODEL_NAME
from toolchain.triton.server import TritonServer

MIN_WARMUP_REQUESTS = 2
REACH_TIMEOUT_S = 10.0


def run_bench(
    server: TritonServer | str,
    *,
    tokenizer_dir: Path,
    concurrency: list[int] | tuple[int, ...] = (1, 4, 16),
    requests: int = 32,
    prompt_tokens: int = 64,
    output_tokens: int = 32,
    seed: int = 0,
    timeout_s: float = 300.0,
    ignore_eos: bool = True,
    model: str = MODEL_NAME,
    engine_dir: Path | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure ``server`` (a running one, or host:port of a gRPC endpoint) at each concurrency.

    ``tokenizer_dir``: engine or checkpoint directory. ``engine_dir``: whose manifest hash goes into the
    result. Failed requests are counted in the result; ToolchainError when nothing at all succeeded or the
    server is not there.
    """
    settings = Settings(
        concurrency=tuple(concurrency),
        requests=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
        timeout_s=timeout_s,
        ignore_eos=ignore_eos,
    )
    progress = progress or Silent()
    url = grpc_address(server)
    counter = TokenCounter(tokenizer_dir)
    about_server = _reach(url, model)
    levels = tuple(
        _measure(url, index, model=model, settings=settings, counter=counter, progress=progress)
        for index in range(len(settings.concurrency))
    )
    result = BenchResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        url=url,
        model=model,
        settings=settings,
        environment=describe_environment(engine_dir=engine_dir, server=about_server),
        levels=levels,
    )
    _refuse_all_failed(result)
    return result


def grpc_address(server: TritonServer | str) -> str:
    """host:port. UsageError for the address of the HTTP endpoint, or what is no address at all."""
    if isinstance(server, TritonServer):
        return server.grpc_url
    address = server.removeprefix("grpc://").rstrip("/")
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        raise UsageError(
            f"{server!r} is not the address of a gRPC endpoint; expected host:port",
            hint="Triton's gRPC port is 8001 unless it was started with another",
            code="TC-701",
        )
    return address


def _measure(
    url: str, index: int, *, model: str, settings: Settings, counter: TokenCounter, progress: Progress
) -> Level:
    """Warm up, then measure one concurrency. No two levels share a prompt."""
    concurrency = settings.concurrency[index]
    warmup = max(MIN_WARMUP_REQUESTS, concurrency)
    prompts = make_prompts(
        counter,
        count=warmup + settings.requests,
        tokens=int(settings.prompt_tokens),
        seed=settings.seed * 1_000_003 + index,
    )
    load = Load(url=url, model=model, concurrency=concurrency, settings=settings, counter=counter)
    warm, _ = run_load(load, prompts[:warmup], progress, description=f"warm-up at {concurrency}")
    records, duration_s = run_load(load, prompts[warmup:], progress, description=f"concurrency {concurrency}")
    warmup_errors = sum(record.error is not None for record in warm)
    start_s = min(record.started_s for record in records)
    measured = Measured(records=records, start_s=start_s, end_s=start_s + duration_s)
    figures = summary([measured], settings=settings, gpus=None)
    return Level(concurrency=concurrency, warmup_errors=warmup_errors, **figures)


def _reach(url: str, model: str) -> dict[str, Any]:
    """Name and version of the server. ToolchainError when it is not there or does not have the model."""
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    client = grpc.InferenceServerClient(url)
    try:
        about = client.get_server_metadata(client_timeout=REACH_TIMEOUT_S)
        ready = client.is_model_ready(model, client_timeout=REACH_TIMEOUT_S)
    except InferenceServerException as error:
        raise ToolchainError(
            f"no Triton server answers at {url}: {error.message()}",
            hint="start one with `toolchain serve ENGINE`; the gRPC port is wanted, not the HTTP one",
            code="TC-702",
        ) from error
    finally:
        client.close()
    if not ready:
        raise ToolchainError(f"the server at {url} has no ready model {model!r}", code="TC-702")
    return {"name": about.name, "version": about.version}


def _refuse_all_failed(result: BenchResult) -> None:
    if any(level.errors < level.requests for level in result.levels):
        return
    message, count = next(iter(asdict(result.levels[0])["error_messages"].items()))
    raise ToolchainError(
        f"every request failed ({result.errors} of {result.errors}); {count} times: {message}",
        hint="look into the server's log",
        code="TC-704",
    )
