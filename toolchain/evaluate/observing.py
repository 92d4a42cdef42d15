"""What happens inside a model during one forward: hidden states behind each decoder layer, experts of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Keep = Callable[[int, "torch.Tensor"], "torch.Tensor"]
"""(layer, hidden [B, T, H]) -> what is kept of it."""


@dataclass
class Observed:
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """Decoder layer -> its output [B, T, H], or what ``keep`` made of it."""
    routing: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Decoder layer -> indices and weights of the chosen experts, [B * T, k] each; only MoE layers."""
    experts: dict[int, int] = field(default_factory=dict)
    """Decoder layer -> number of experts."""


@contextmanager
def observe(model: Any, keep: Keep | None = None) -> Iterator[Observed]:
    """Filled by the forwards of ``model`` inside of the block; the last one counts.

    It listens at the experts, not at the routers: routers of different families return different things, but all
    experts are called with (hidden [N, H], indices [N, k], weights [N, k]). Layers of an architecture without a list
    of them are not observed.
    """
    from toolchain.modeling.decoder import find_decoder_layers

    observed = Observed()
    _, layers = find_decoder_layers(model) or ("", [])
    hooks = [
        layer.register_forward_hook(_hidden(observed, index, keep)) for index, layer in enumerate(layers)
    ]
    for index, module in moe_layers(model).items():
        observed.experts[index] = module.num_experts
        hooks.append(module.register_forward_pre_hook(_routing(observed, index)))
    try:
        yield observed
    finally:
        for hook in hooks:
            hook.remove()


def moe_layers(model: Any) -> dict[int, Any]:
    """Decoder layer -> its ``UnfusedExperts``; numbered in their order in an architecture without a list of layers."""
    from toolchain.modeling.decoder import find_decoder_layers
    from toolchain.modeling.experts import UnfusedExperts

    prefix, _ = find_decoder_layers(model) or ("", None)
    found: dict[int, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            number = path.removeprefix(f"{prefix}.").partition(".")[0]
            found[int(number) if prefix and number.isdigit() else len(found)] = module
    return found


def _hidden(observed: Observed, layer: int, keep: Keep | None) -> Any:
    def record(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        observed.hidden[layer] = keep(layer, hidden) if keep else hidden

    return record


def _routing(observed: Observed, layer: int) -> Any:
    def record(module: Any, arguments: tuple[Any, ...]) -> None:
        observed.routing[layer] = (arguments[1].detach(), arguments[2].detach())

    return record
