"""What an endpoint serves, and how long it waits for what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.triton.contract import MODEL_NAME
from toolchain.triton.engine_dir import EngineDir

TARGETS = ("local", "trtllm")
"""Targets whose model has the tensors of ``toolchain.triton.contract``."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model of the Triton server, as clients of the endpoint see it."""

    tokenizer: Path
    """Directory with the engine's tokenizer and chat template: ``ENGINE/checkpoint``."""
    max_seq_len: int | None = None
    """Tokens of prompt and answer together; None: unknown, then only the model itself refuses what is too long."""
    aliases: tuple[str, ...] = ()
    """Further names that a client may use. An answer carries the name by which it was asked for."""
    chat_template: Path | None = None
    """A Jinja file that takes the place of the tokenizer's own template."""

    @classmethod
    def of_engine(cls, engine: EngineDir, *, chat_template: Path | None = None) -> ServedModel:
        """The model of ``engine``, also called by the engine's name. UsageError TC-641 for target tensorrt."""
        if engine.target not in TARGETS:
            raise UsageError(
                f"the OpenAI endpoint serves targets {' and '.join(TARGETS)}; {engine.name} has target "
                f"{engine.target}, whose ensemble has other tensors and neither log probabilities nor errors by kind",
                hint="build it for target trtllm, or use the frontend of NVIDIA's container",
                code="TC-641",
            )
        limits: dict[str, Any] = engine.manifest.get("limits") or {}
        return cls(
            tokenizer=engine.checkpoint,
            max_seq_len=limits.get("max_seq_len"),
            aliases=() if engine.name == MODEL_NAME else (engine.name,),
            chat_template=chat_template,
        )


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """No wait and no body is unbounded: a stub that died never answers, and says nothing about it."""

    request_timeout_s: float = 600.0
    """From the request to the end of its answer."""
    stall_timeout_s: float = 60.0
    """From one piece of a streamed answer to the next, after the first one."""
    probe_timeout_s: float = 5.0
    """The inference behind ``/health/ready``."""
    body_timeout_s: float = 30.0
    """From the head of a request to the end of its body."""
    max_body_bytes: int = 8 * 1024**2
    max_in_flight: int = 1024
    """Requests for completions at a time; more get 429 at once. The model has a queue of its own behind it."""
    max_choices: int = 128
    """Prompts times ``n`` of one request: each is a request to the model."""
