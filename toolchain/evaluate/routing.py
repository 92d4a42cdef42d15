"""Which experts a MoE model sends its tokens to, and how much of that quantization changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Routing:
    """Records the chosen experts of every MoE layer during a forward; a context manager.

    It listens at the experts, not at the routers: routers of different families return different things, but all
    experts are called with (hidden [N, H], indices [N, k], weights [N, k]).
    """

    def __init__(self, model: Any) -> None:
        from toolchain.modeling.experts import UnfusedExperts

        self._modules = [module for module in model.modules() if isinstance(module, UnfusedExperts)]
        self._chosen: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Routing:
        for layer, module in enumerate(self._modules):
            self._hooks.append(module.register_forward_pre_hook(self._recorder(layer)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self) -> list[torch.Tensor]:
        """Expert indices [N, k] of each MoE layer in the last forward; empty for a dense model."""
        chosen, self._chosen = self._chosen, {}
        return [chosen[layer] for layer in sorted(chosen)]

    def _recorder(self, layer: int) -> Any:
        def record(module: Any, arguments: tuple[Any, ...]) -> None:
            self._chosen[layer] = arguments[1]

        return record


class RoutingAgreement:
    """Share of expert choices that two models have in common, per MoE layer."""

    def __init__(self) -> None:
        self._common: list[float] = []
        self._choices: list[int] = []

    def add(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
        """The choices [N, k] of both models in each MoE layer, for the same tokens.

        Models whose experts were not recorded alike (one of them keeps fused experts) are not compared.
        """
        if len(first) != len(second):
            return
        if not self._common:
            self._common, self._choices = [0.0] * len(first), [0] * len(first)
        for layer, (mine, theirs) in enumerate(zip(first, second, strict=True)):
            same = mine[:, :, None] == theirs.to(mine.device)[:, None, :]
            self._common[layer] += float(same.any(dim=-1).sum())
            self._choices[layer] += mine.numel()

    def by_layer(self) -> tuple[float, ...]:
        """0 to 1 for each MoE layer, in order; empty for dense models."""
        return tuple(common / total for common, total in zip(self._common, self._choices, strict=True))
