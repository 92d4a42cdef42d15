"""What the runtime needs of a model: load it, and one forward over a left-padded batch."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import ToolchainError
from toolchain.runtime.rows import attend_by_row, rows

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch

    from toolchain.runtime.batch import Batch
    from toolchain.runtime.paged.setup import Paged, Paging
    from toolchain.runtime.request import Request


PREFILL_TOKENS = {"cpu": 1024}
OTHER_PREFILL_TOKENS = 8192
"""Most positions, padding included, of one prefill forward, by type of device: enough to keep the matmuls busy, few
enough to bound memory and the pause that a new prompt makes in the answers that are being generated."""


def resolve_device(name: str) -> torch.device:
    """``auto``: the GPU if there is one, else the CPU. Raises UsageError for a device that is not there."""
    from toolchain.modeling.loading import pick_device

    return pick_device(name)


def load_model(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    emulate_activations: bool,
    packed: bool = False,
) -> Any:
    """The checkpoint as a transformers model in eval mode on ``device``: with decoded weights, or ``packed``."""
    from toolchain.modeling.loading import load_checkpoint
    from toolchain.modeling.packed import load_packed

    try:
        if packed:
            return load_packed(directory, device=device, dtype=dtype)
        return load_checkpoint(
            directory, device=device, dtype=dtype, emulate_activations=emulate_activations
        ).eval()
    except ToolchainError:
        raise
    except Exception as error:
        # transformers and its config validation raise many kinds; a user needs the directory and the reason.
        raise ToolchainError(
            f"{directory} cannot be loaded on {device}: {type(error).__name__}: {error}",
            hint="`toolchain verify` audits its files; out of memory: use a larger device or --device cpu",
            code="TC-502",
        ) from error


def end_ids(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """All ids that end an answer: generation_config.json, else config.json, else the tokenizer."""
    from toolchain.core.files import read_json

    file = directory / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    for candidate in (found, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        if candidate is not None:
            return frozenset(candidate if isinstance(candidate, list) else [candidate])
    return frozenset()


@dataclass(kw_only=True)
class Runner:
    """Runs a model over batches whose rows end at the same column (padding on the left)."""

    model: Any
    device: torch.device
    mergeable: bool = False
    """Whether KV caches of several sequences can live in one batch (set by ``probe``)."""
    prefill_tokens: int = 0
    """Most positions of one prefill forward; 0: what suits the device."""
    paging: Paging | None = None
    """Decode over pages, where the model can."""
    paged: Paged | None = None
    notes: list[str] = field(default_factory=list)
    """What a user should know of how this model runs."""
    _options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            self._options["logits_to_keep"] = 1
        if self.prefill_tokens == 0:
            self.prefill_tokens = PREFILL_TOKENS.get(self.device.type, OTHER_PREFILL_TOKENS)

    def bind(self) -> None:
        """Make this thread work on the model's GPU: Triton launches on the thread's current one."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def probe(self) -> None:
        """One forward over one token: a model that cannot run fails here; its cache tells how to batch it."""
        import torch

        from toolchain.runtime.kv import can_merge

        self.bind()
        if self.paging is None:
            self._attend_by_row()
        with torch.inference_mode():
            ids = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            cache = getattr(self.model(input_ids=ids, use_cache=True), "past_key_values", None)
        if cache is None:
            raise ToolchainError(
                f"{type(self.model).__name__} keeps no KV cache, the local runtime cannot generate with it",
                code="TC-502",
            )
        self.mergeable = can_merge(cache)
        if self.paging is not None:
            self._set_up_pages(cache, self.paging)

    def _set_up_pages(self, cache: Any, wish: Paging) -> None:
        from toolchain.runtime.paged.attention import NotPaged
        from toolchain.runtime.paged.setup import set_up

        why = "its cache holds more than keys and values"
        if self.mergeable:
            try:
                self.paged = set_up(self.model, cache, wish, device=self.device, options=self._options)
            except NotPaged as error:
                why = str(error)
            else:
                self.notes += self.paged.notes
                return
        kept = (
            ""
            if not wish.in_fp8 and not wish.static
            else "; the cache is transformers' own, in the model's dtype"
        )
        self.notes.append(f"decoding runs without pages and CUDA graphs: {why}{kept}")
        self._attend_by_row()

    def _attend_by_row(self) -> None:
        if self.device.type == "cpu":
            attend_by_row(self.model)

    def batch(self, requests: Sequence[Request], lengths: Sequence[int], cache: Any) -> Batch:
        """Requests whose prompts are in ``cache``, ready for their steps."""
        if self.paged is not None:
            from toolchain.runtime.paged.batch import PagedBatch

            return PagedBatch(self.paged.decoder, self.paged.pages, requests, lengths, cache)
        from toolchain.runtime.batch import Batch

        return Batch(self, requests, lengths, cache)

    def reserve(self, request: Request) -> bool:
        """Whether there is memory for all that ``request`` may become; if so, it is its own from now on."""
        if self.paged is None:
            return True
        positions = len(request.prompt_ids) + request.budget
        return self.paged.pool.reserve(request, positions) is not None

    def keep_only(self, requests: Collection[Request]) -> None:
        """Take back what other requests had reserved."""
        if self.paged is not None:
            self.paged.pool.keep_only(requests)

    def forward(
        self, tokens: Sequence[Sequence[int]], past: Sequence[int], cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Feed ``tokens[i]`` to row i, which has ``past[i]`` positions in ``cache``.

        Returns the last logits [B, V] and the cache. Rows of ``tokens`` may differ in length only when all of
        ``past`` are 0. ``cache`` None: the model makes its own.
        """
        import torch

        new = max(len(row) for row in tokens)
        width = max(past) + new
        filled = torch.tensor(
            [[done + len(row)] for done, row in zip(past, tokens, strict=True)], device=self.device
        )
        columns = torch.arange(width, device=self.device)[None, :]
        padding = width - filled
        with rows([width - done - len(row) for done, row in zip(past, tokens, strict=True)], width):
            output = self.model(
                input_ids=torch.tensor(
                    [[0] * (new - len(row)) + list(row) for row in tokens], device=self.device
                ),
                attention_mask=(columns >= padding).long(),
                position_ids=(columns - padding).clamp(min=0)[:, width - new :],
                past_key_values=cache,
                use_cache=True,
                **self._options,
            )
        return output.logits[:, -1], output.past_key_values
