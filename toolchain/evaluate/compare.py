"""A quantized model against the model it was made of, both in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from toolchain.core.errors import UsageError
from toolchain.core.progress import Progress, Silent
from toolchain.evaluate.measuring import Variant, Work, fitting_rows, measure
from toolchain.evaluate.perplexity import model_of, vocab_size_of
from toolchain.evaluate.summary import figures
from toolchain.evaluate.windows import cut

AS_IT_IS = "model"
"""Name of the only variant of models in memory: with the switches they have."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What quantization changed. Logarithms are natural; every figure is over the same scored tokens."""

    tokens: int
    nll: float
    """Mean negative log likelihood of the quantized model, nats per token."""
    ppl: float
    """Perplexity of the quantized model: exp(nll)."""
    baseline_ppl: float
    ppl_increase: float
    """ppl / baseline_ppl - 1."""
    kl_mean: float
    """KL(baseline || quantized) per token, in nats: how much of the baseline's distribution is lost."""
    kl_median: float
    kl_p99: float
    """The worst percent of tokens: quantization damage is concentrated, and a mean hides it."""
    reverse_kl_mean: float
    """KL(quantized || baseline): large where the quantized model prefers what the baseline would not say."""
    reverse_kl_median: float
    reverse_kl_p99: float
    top1_agreement: float
    """Share of tokens at which both models prefer the same next token, 0 to 1."""
    top5_agreement: float
    """Mean share of the five likeliest tokens that both have in common, 0 to 1, whatever their order."""
    router_agreement: float | None = None
    """Share of expert choices that both models have in common, 0 to 1, over all MoE layers; None for a dense
    model. Routers are not quantized: what they choose differs because their inputs do."""
    router_set_agreement: float | None = None
    """Share of tokens, per layer, whose whole set of experts is the same."""
    router_weighted_agreement: float | None = None
    """``router_agreement`` with each choice of the baseline counted by its routing weight: losing the last of eight
    experts is not losing the first."""
    router_agreement_by_layer: tuple[float, ...] = ()
    """``router_agreement`` of each MoE layer, in order."""

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

    Only a few numbers per token are kept, never the logits. Raises UsageError (TC-522) when the vocabularies
    differ in size, TC-523 for bad settings.
    """
    from toolchain.modeling.emulation import emulation_of

    refuse_other_size(source, baseline)
    windows = cut(len(token_ids), window=window, stride=stride or window, bos=bos is not None)
    size = batch_size or fitting_rows(source, window)
    work = Work(token_ids=token_ids, windows=windows, bos=bos, batch_size=size)
    switches = emulation_of(model_of(source))
    variant = Variant(name=AS_IT_IS, activations=switches.activations, kv_cache=switches.kv_cache)
    records = measure(source, baseline, work, variants=[variant], progress=progress or Silent())
    found = figures(records, AS_IT_IS)
    found["router_agreement_by_layer"] = tuple(found["router_agreement_by_layer"])
    return Metrics(**{item.name: found[item.name] for item in fields(Metrics)})


def refuse_other_size(source: Any, baseline: Any) -> None:
    """UsageError TC-522 unless both models predict over as many tokens."""
    sizes = vocab_size_of(source), vocab_size_of(baseline)
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"vocabularies of {sizes[0]} and {sizes[1]} tokens cannot be compared",
            hint="give the baseline that the checkpoint was made of",
            code="TC-522",
        )
