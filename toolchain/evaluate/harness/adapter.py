"""The local runtime as a model of lm-evaluation-harness. Imported late: needs ``lm_eval`` (``library.py``)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from toolchain.core.errors import ToolchainError
from toolchain.core.progress import Progress, Silent
from toolchain.evaluate.harness.generation import Generation
from toolchain.evaluate.windows import fitting_batch_size
from toolchain.runtime.engine import LocalEngine

if TYPE_CHECKING:
    import torch

DEFAULT_GENERATED_TOKENS = 256
"""Length of an answer where a task names none: the harness's own default for every backend."""
Scored = tuple[Any, list[int], list[int]]
"""(what was asked, context ids, continuation ids)."""


class LocalLM(TemplateLM):
    """Scores and generates with a ``LocalEngine``; conventions are those of the harness's Hugging Face model.

    Contexts that are too long lose their beginning, so that what is scored or continued stays whole.
    """

    def __init__(
        self, engine: LocalEngine, *, batch_size: int | None = None, progress: Progress | None = None
    ) -> None:
        """``batch_size``: most rows of one scoring forward; None: what fits, at most 8. Answers are generated in the
        engine's own batch."""
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.batch_size = batch_size
        self.progress = progress or Silent()
        self.truncated = 0
        """Requests that lost the beginning of their context."""

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or the end token where a tokenizer has none."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        return self.engine.limits.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of ``string``. By default with the special tokens of the tokenizer, unless BOS stands there already."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log likelihood of whole texts, each token once, in windows of ``max_length``."""
        windows: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers in the order of ``requests``; the engine joins and leaves its batch as they come and end."""
        asked = [
            Generation.of(
                self.engine,
                self.tok_encode(request.args[0]),
                request.args[1],
                seed=number,
                default_tokens=DEFAULT_GENERATED_TOKENS,
            )
            for number, request in enumerate(requests)
        ]
        self.truncated += sum(item.truncated for item in asked)
        open_, answers = deque[Generation](), list[str]()
        for item in self.progress.track(asked, description="generate", total=len(asked)):
            item.start()
            open_.append(item)
            if (
                len(open_) > 2 * self.engine.limits.max_batch_size
            ):  # enough to fill every row that becomes free
                answers.append(open_.popleft().text())
        return answers + [item.text() for item in open_]

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log likelihood of the continuation in nats, whether greedy decoding would give it) of each request.

        Requests that feed the model the same tokens (the one-token answers of a multiple choice) share one row.
        """
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_asked, context, continuation) in enumerate(requests):
            self._refuse_long(continuation)
            tokens = (context + continuation)[:-1]
            self.truncated += len(tokens) > self.max_length
            rows[tuple(tokens[-self.max_length :])].append(number)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self.progress.track(list(self._batches(list(rows))), description="score"):
            for row, logits in zip(batch, self._logits(batch), strict=True):
                for number in rows[row]:
                    results[number] = score(logits, requests[number][2])
        return results

    def _batches(self, rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Rows of similar length together, the longest first: a lack of memory shows at once."""
        rows = sorted(rows, key=lambda row: (-len(row), row))
        found = []
        while rows:
            fitting = fitting_batch_size(len(rows[0]), self.engine.vocab_size)
            size = min(self.batch_size or fitting, fitting)
            found.append(rows[:size])
            rows = rows[size:]
        return found

    def _logits(self, batch: list[tuple[int, ...]]) -> list[torch.Tensor]:
        """Logits [T_i, V] float32 of each row. Padding stands on the right, where causal attention never looks."""
        import torch

        width = max(map(len, batch))
        padded = [[*row, *[row[-1]] * (width - len(row))] for row in batch]
        logits = self.engine.forward_logits(torch.tensor(padded))
        return [item[: len(row)] for item, row in zip(logits, batch, strict=True)]

    def _refuse_long(self, continuation: list[int]) -> None:
        if len(continuation) > self.max_length:
            raise ToolchainError(
                f"a task scores an answer of {len(continuation)} tokens, the engine takes {self.max_length}",
                hint="build the engine with a larger --max-seq-len, or leave that task out",
                code="TC-543",
            )


def score(logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log likelihood (nats, summed in float64) of ``continuation`` at the end of ``logits`` [T, V], and whether each
    of its tokens is the likeliest."""
    import torch

    last = logits[-len(continuation) :].double()
    targets = torch.tensor(continuation, device=last.device)
    chosen = torch.log_softmax(last, dim=-1).gather(-1, targets[:, None])
    return float(chosen.sum()), bool((last.argmax(dim=-1) == targets).all())
