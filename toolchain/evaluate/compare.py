"""A quantized model against the model it was made of, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.evaluate.perplexity import ROWS, logits_of, model_of, token_nll, vocab_size_of
from toolchain.evaluate.routing import Routing, RoutingAgreement
from toolchain.evaluate.windows import batches, count_batches, cut, fitting_batch_size

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What quantization changed. Logarithms are natural; every figure is over the same scored tokens."""

    tokens: int
    ppl: float
    """Perplexity of the quantized model."""
    baseline_ppl: float
    kl_mean: float
    """KL(baseline || quantized) per token, in nats: how much of the baseline's distribution is lost."""
    kl_median: float
    kl_p99: float
    """The worst percent of tokens: quantization damage is concentrated, and a mean hides it."""
    top1_agreement: float
    """Share of tokens at which both models prefer the same next token, 0 to 1."""
    router_agreement: float | None = None
    """Share of expert choices that both models have in common, 0 to 1, over all MoE layers; None for a dense
    model. Routers are not quantized: what they choose differs because their inputs do."""
    router_agreement_by_layer: tuple[float, ...] = ()
    """The same for each MoE layer, in order."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "router_agreement_by_layer": list(self.router_agreement_by_layer)}


def compare_models(
    source: Any,
    baseline: Any,
    token_ids: Sequence[int],
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int | None = None,
    bos: int | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """Metrics of ``source`` against ``baseline`` (LocalEngine or transformers model each), batch by batch.

    Only one number per token is kept, never the logits. Raises UsageError (TC-522) when the vocabularies
    differ in size, TC-523 for bad settings.
    """
    sizes = vocab_size_of(source), vocab_size_of(baseline)
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"vocabularies of {sizes[0]} and {sizes[1]} tokens cannot be compared",
            hint="give the baseline that the checkpoint was made of",
            code="TC-522",
        )
    windows = cut(len(token_ids), window=window, stride=stride or window, bos=bos is not None)
    size = batch_size or fitting_batch_size(window, sizes[0])
    collected = _Collected()
    work = batches(token_ids, windows, bos=bos, batch_size=size)
    bar = progress or Silent()
    run, run_baseline = logits_of(source), logits_of(baseline)
    with Routing(model_of(source)) as routing, Routing(model_of(baseline)) as routing_baseline:
        for batch in bar.track(work, description="evaluate", total=count_batches(windows, size)):
            logits = batch.predictions(run(batch.input_ids))
            chosen = routing.take()
            reference = batch.predictions(run_baseline(batch.input_ids)).to(logits.device)
            collected.add(logits, reference, batch.targets().to(logits.device))
            collected.routing.add(chosen, routing_baseline.take())
    return collected.metrics()


def token_kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) [N] float64 in nats, of two [N, V]."""
    import torch

    p, q = torch.log_softmax(reference.double(), dim=-1), torch.log_softmax(logits.double(), dim=-1)
    # A token that the reference excludes (-inf) contributes nothing; exp(-inf) * -inf would be NaN.
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(dim=-1)


class _Collected:
    """Sums, and one KL per token for the percentiles."""

    def __init__(self) -> None:
        self._nll = self._baseline_nll = 0.0
        self._agreed = 0
        self._kl: list[torch.Tensor] = []
        self.routing = RoutingAgreement()

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        for at in range(0, len(targets), ROWS):
            mine, theirs, target = (item[at : at + ROWS] for item in (logits, reference, targets))
            self._nll += float(token_nll(mine, target).sum())
            self._baseline_nll += float(token_nll(theirs, target).sum())
            self._agreed += int((mine.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
            self._kl.append(token_kl(mine, theirs).cpu())

    def metrics(self) -> Metrics:
        import torch

        kl = torch.cat(self._kl)
        layers = self.routing.by_layer()
        return Metrics(
            tokens=len(kl),
            ppl=math.exp(self._nll / len(kl)),
            baseline_ppl=math.exp(self._baseline_nll / len(kl)),
            kl_mean=float(kl.mean()),
            kl_median=float(kl.quantile(0.5)),
            kl_p99=float(kl.quantile(0.99)),
            top1_agreement=self._agreed / len(kl),
            router_agreement=sum(layers) / len(layers) if layers else None,
            router_agreement_by_layer=layers,
        )
