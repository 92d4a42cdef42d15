"""The attention of transformers models: over pages in a decoding step, as before elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from toolchain.runtime.paged.pages import KvPages, Step
from toolchain.runtime.rows import attention_of

PREFIX = "toolchain_paged_"
BASES = ("sdpa", "eager")
_step: ContextVar[tuple[KvPages, Step] | None] = ContextVar("step", default=None)


class NotPaged(Exception):
    """A model whose attention cannot read pages; the text says why."""


@contextmanager
def stepping(pages: KvPages, step: Step) -> Iterator[None]:
    """While inside, attention reads ``pages``."""
    token = _step.set((pages, step))
    try:
        yield
    finally:
        _step.reset(token)


def attend_in_pages(model: Any) -> None:
    """Make ``model`` attend over pages in decoding steps. NotPaged where its attention is not in its interface, or is
    of a kind that the kernel does not know."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = getattr(model.config, "_attn_implementation", None)
    config = model.config.get_text_config()
    if name not in BASES or not model._can_set_attn_implementation():
        raise NotPaged(f"its attention is {name!r}")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise NotPaged("it attends in chunks")
    if getattr(config, "attn_logit_softcapping", None):
        raise NotPaged("it caps the scores of attention")
    AttentionInterface.register(PREFIX + name, _paged(name))
    AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(PREFIX + name)
    if model.config._attn_implementation != PREFIX + name:
        raise NotPaged("its attention cannot be exchanged")


def attend_as_before(model: Any) -> None:
    name = model.config._attn_implementation
    if name.startswith(PREFIX):
        model.set_attn_implementation(name.removeprefix(PREFIX))


def _paged(name: str) -> Any:
    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """query [B, H, Q, D] -> [B, Q, H, D] and no weights."""
        found = _step.get()
        if found is None:
            return attention_of(name, module)(module, query, key, value, attention_mask, **kwargs)
        return _over_pages(*found, module, query, (key, value), kwargs), None

    return attend


def _over_pages(
    pages: KvPages,
    step: Step,
    module: Any,
    query: torch.Tensor,
    given: tuple[Any, Any],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    from toolchain.kernels.decoding import attend

    index = module.layer_idx
    stored = step.stored.get(index)
    if stored is None or stored[0] is not given[0] or stored[1] is not given[1]:
        raise NotPaged("what it attends to is not what it puts into its cache")
    layer = pages.layers[index]
    scaling = kwargs.get("scaling")
    result = attend(
        query[:, :, 0],
        layer.keys,
        layer.values,
        pages.table,
        step.slots,
        step.lengths,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=int(kwargs.get("sliding_window") or 0),
        sinks=kwargs.get("s_aux"),
        key_scale=layer.key_scale,
        value_scale=layer.value_scale,
    )
    return result.unsqueeze(1)
