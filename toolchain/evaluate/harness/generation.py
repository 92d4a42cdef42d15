"""One answer that a task asks for: what the harness's ``generation_kwargs`` mean to the local engine."""

from __future__ import annotations

from typing import Any

from toolchain.core.errors import ToolchainError
from toolchain.runtime.detokenize import special_ids
from toolchain.runtime.engine import LocalEngine
from toolchain.runtime.request import RequestHandle
from toolchain.runtime.types import DEFAULT_MAX_TOKENS, Chunk, SamplingParams

TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks use for the longest answer, the first one given counts (``lm_eval.models.utils``)."""


class Generation:
    """A request to the engine. Stop strings that are special tokens end it too, though they are no text."""

    def __init__(
        self, engine: LocalEngine, ids: list[int], params: SamplingParams, stop_ids: frozenset[int]
    ) -> None:
        self._engine = engine
        self._room = engine.limits.max_seq_len - (params.max_tokens or DEFAULT_MAX_TOKENS)
        self._ids = ids[-self._room :]
        self._params = params
        self._stop_ids = stop_ids
        self._handle: RequestHandle | None = None
        self._stopped = False
        self.truncated = len(ids) > self._room

    @classmethod
    def of(
        cls, engine: LocalEngine, ids: list[int], settings: dict[str, Any], *, seed: int, default_tokens: int
    ) -> Generation:
        """``settings``: ``until``, one of ``TOKEN_LIMITS``, ``do_sample``, ``temperature``, ``top_p``, ``top_k``.

        Greedy unless ``do_sample`` (or a temperature above 0 without it) asks for more; then ``seed`` decides.
        ToolchainError TC-543 when the answer leaves no room for a prompt.
        """
        limit = int(next((settings[name] for name in TOKEN_LIMITS if settings.get(name)), default_tokens))
        if limit >= engine.limits.max_seq_len:
            raise ToolchainError(
                f"a task asks for answers of up to {limit} tokens, the engine takes {engine.limits.max_seq_len} with "
                "the prompt",
                hint="build the engine with a larger --max-seq-len, or leave that task out",
                code="TC-543",
            )
        temperature = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample") is False:
            temperature = 0.0
        elif settings.get("do_sample") and "temperature" not in settings:
            temperature = 1.0
        stops, stop_ids = _stops(engine, settings.get("until"))
        params = SamplingParams(
            max_tokens=limit,
            temperature=temperature,
            top_p=float(settings.get("top_p") or 1.0),
            top_k=int(settings.get("top_k") or 0),
            seed=seed,
            stop=stops,
        )
        return cls(engine, ids, params, stop_ids)

    def start(self) -> RequestHandle:
        self._handle = self._engine.submit(self._ids, self._params, self._on_chunk)
        return self._handle

    def text(self) -> str:
        """Wait for the answer."""
        answer = (self._handle or self.start()).result()
        at = next((i for i, token in enumerate(answer.token_ids) if token in self._stop_ids), None)
        if at is None:
            return answer.text
        cut: str = self._engine.tokenizer.decode(answer.token_ids[:at], skip_special_tokens=True)
        return cut

    def _on_chunk(self, chunk: Chunk) -> None:
        # The first chunks may come before submit() has returned the handle.
        self._stopped = self._stopped or not self._stop_ids.isdisjoint(chunk.token_ids)
        if self._stopped and self._handle is not None:
            self._handle.cancel()


def _stops(engine: LocalEngine, until: str | list[str] | None) -> tuple[tuple[str, ...], frozenset[int]]:
    """(stop strings, ids of those that are special tokens)."""
    texts = [text for text in ([until] if isinstance(until, str) else until or []) if text]
    tokenizer = engine.tokenizer
    ids = {token for token in special_ids(tokenizer) if tokenizer.convert_ids_to_tokens(token) in texts}
    return tuple(dict.fromkeys(texts)), frozenset(ids)
