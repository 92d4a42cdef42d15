"""The local engine: an exported checkpoint that answers requests, on any CPU or GPU that PyTorch runs on."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import ToolchainError, UsageError
from toolchain.core.progress import Progress
from toolchain.data.tokenizer import load_tokenizer
from toolchain.runtime.detokenize import Detokenizer, special_ids
from toolchain.runtime.encode import Encoder
from toolchain.runtime.location import Limits, locate, resolve_limits
from toolchain.runtime.model import Runner, end_ids, load_model, resolve_device
from toolchain.runtime.request import OnChunk, OnError, Request, RequestHandle
from toolchain.runtime.scheduler import Load, Scheduler
from toolchain.runtime.tuned import tuned
from toolchain.runtime.types import DEFAULT_MAX_TOKENS, Chunk, Completion, SamplingParams
from toolchain.runtime.waiting import QueueLimits
from toolchain.runtime.ways import Way, Wish, choose_way, paging_of

if TYPE_CHECKING:
    import torch

    from toolchain.runtime.paged.setup import Paging


class LocalEngine:
    """Generates for many callers at once; every method may be called from any thread. A context manager."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: torch.device,
        limits: Limits,
        end_ids: frozenset[int] = frozenset(),
        name: str = "model",
        queue: QueueLimits | None = None,
        paging: Paging | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """``model``: a transformers causal LM in eval mode on ``device``. ``load`` makes all of these."""
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.limits = limits
        self.end_ids = end_ids
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._special = special_ids(tokenizer)
        runner = Runner(model=model, device=device, paging=paging)
        runner.probe()
        if runner.paged is not None and runner.paged.pool.longest < limits.max_seq_len:
            limits = self.limits = replace(limits, max_seq_len=runner.paged.pool.longest)
        self.encoder = Encoder(tokenizer, limits.max_seq_len)
        self.notes = (*notes, *runner.notes)
        """What a user should know of how it runs: what is not fast, and why."""
        self._scheduler = Scheduler(
            runner, max_batch_size=limits.max_batch_size, queue=queue or QueueLimits()
        )

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        emulate_activations: bool = True,
        max_batch_size: int | None = None,
        max_seq_len: int | None = None,
        queue: QueueLimits | None = None,
        wish: Wish | None = None,
        way: Way | None = None,
        progress: Progress | None = None,
    ) -> LocalEngine:
        """Load an engine directory (engine.json, checkpoint/) or a checkpoint directory.

        ``dtype``: compute dtype, by default the checkpoint's. ``emulate_activations``: apply the activation
        quantization of the target hardware. ``wish``: of kernels and KV cache; ``way``: instead of the one that follows
        from it. Raises UsageError or ToolchainError (TC-502, TC-507, TC-509, TC-516, TC-517).
        """
        location = locate(path)
        target = resolve_device(device)
        tokenizer = load_tokenizer(location.checkpoint)
        wish = wish or Wish()
        way = way or choose_way(location.checkpoint, target, dtype, wish, emulate=emulate_activations)
        model = load_model(
            location.checkpoint,
            device=target,
            dtype=dtype,
            emulate_activations=emulate_activations,
            packed=way.packed,
        )
        config = model.config.get_text_config()
        limits = resolve_limits(
            location, config.to_dict(), max_batch_size=max_batch_size, max_seq_len=max_seq_len
        )
        notes = list(way.notes)
        if way.packed and target.type == "cuda":
            notes += tuned(model, location.engine, limits, device=target, progress=progress)
        return cls(
            model,
            tokenizer,
            device=target,
            limits=limits,
            end_ids=end_ids(location.checkpoint, config, tokenizer),
            name=location.name,
            queue=queue,
            paging=paging_of(way, wish, limits, planned=bool(location.planned) or max_seq_len is not None),
            notes=notes,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, by default with the special tokens (BOS) that the tokenizer puts around text."""
        return self.encoder.encode(text, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation and the generation prompt: pass them to ``submit`` as they are."""
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"the tokenizer of {self.name} has no chat template",
                hint="send a plain prompt",
                code="TC-503",
            )
        return self.encoder.chat(list(messages))

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        on_chunk: OnChunk,
        *,
        on_error: OnError | None = None,
        streaming: bool = True,
        timeout_s: float | None = None,
    ) -> RequestHandle:
        """Queue a request and return at once. Callbacks run on the model thread: keep them short.

        Without ``streaming`` the answer is one chunk (and costs less). A request that has not ended after
        ``timeout_s`` fails (TC-513). Raises UsageError for a prompt that cannot be taken (TC-503), ToolchainError
        when the queue is full (TC-505) or the engine is closed (TC-506). Later failures go to ``on_error`` and
        ``RequestHandle.result``.
        """
        if isinstance(prompt, str):
            ids = self.encode(prompt, add_special_tokens=params.add_special_tokens)
        else:
            ids = [int(token) for token in prompt]
        echo = "" if params.exclude_input_from_output else self._text_of(prompt, ids)
        request = Request(
            prompt_ids=ids,
            echo=echo,
            params=params,
            budget=self._budget(ids, params),
            detokenizer=Detokenizer(self.tokenizer, self._special, ids if echo else ()),
            end_ids=self.end_ids,
            on_chunk=on_chunk,
            on_error=on_error,
            streaming=streaming,
            timeout_s=timeout_s,
        )
        self._scheduler.add(request)
        return RequestHandle(request, self._scheduler.wake)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        """Chunks as they come. Leaving the loop early cancels the request."""
        chunks: queue.SimpleQueue[Chunk | ToolchainError] = queue.SimpleQueue()
        handle = self.submit(prompt, params, chunks.put, on_error=chunks.put)
        return self._receive(handle, chunks)

    def _receive(
        self, handle: RequestHandle, chunks: queue.SimpleQueue[Chunk | ToolchainError]
    ) -> Iterator[Chunk]:
        try:
            while True:
                item = chunks.get()
                if isinstance(item, ToolchainError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            handle.cancel()

    def generate(self, prompt: str | Sequence[int], params: SamplingParams) -> Completion:
        """The whole answer."""
        return self.submit(prompt, params, lambda chunk: None, streaming=False).result()

    def load_now(self) -> Load:
        """How many requests run and wait at this moment."""
        return self._scheduler.load()

    def on_flush(self, function: Callable[[], None]) -> None:
        """Have ``function`` called on the model thread each time after a round of callbacks."""
        self._scheduler.flush = function

    def forward_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] float32, on the engine's device, for unpadded ``input_ids`` [B, T] (int64)."""
        import torch

        def run() -> torch.Tensor:
            # no_grad, not inference_mode: callers may go on computing with the result.
            with torch.inference_mode(False), torch.no_grad():
                logits: torch.Tensor = self.model(input_ids=input_ids.to(self.device), use_cache=False).logits
                return logits.float()

        result: torch.Tensor = self._scheduler.call(run)
        return result

    def close(self) -> None:
        """End the model thread; unfinished requests fail with TC-506."""
        self._scheduler.close()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _text_of(self, prompt: str | Sequence[int], ids: list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _budget(self, ids: list[int], params: SamplingParams) -> int:
        """Most tokens of the answer. UsageError for a prompt that cannot be taken, or an answer that does not fit."""
        longest = self.limits.max_seq_len
        room = longest - len(ids)
        if not ids:
            raise UsageError("the prompt is empty", hint="send at least one token", code="TC-503")
        if room < 1:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, max_seq_len is {longest} with the answer",
                hint="shorten the prompt, or build an engine with a larger --max-seq-len",
                code="TC-503",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise UsageError(
                f"max_tokens {params.max_tokens} and the {len(ids)} tokens of the prompt exceed max_seq_len {longest}",
                hint=f"use max_tokens <= {room} or leave it out, or build an engine with a larger --max-seq-len",
                code="TC-503",
            )
        unknown = [token for token in ids if not 0 <= token < self.vocab_size]
        if unknown:
            raise UsageError(f"token ids {unknown[:5]} are not in 0..{self.vocab_size - 1}", code="TC-503")
        return params.max_tokens or min(DEFAULT_MAX_TOKENS, room)
