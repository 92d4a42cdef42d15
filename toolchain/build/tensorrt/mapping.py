"""Who holds what: ranks, their layers and their experts, as ``tensorrt_llm/mapping.py`` (1.2) numbers them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of ``of`` equal parts of a dimension."""

    index: int = 0
    of: int = 1


WHOLE = Share()


@dataclass(frozen=True, kw_only=True)
class Rank:
    number: int
    """In the name of its file: ``rank{number}.safetensors``."""
    tp: Share
    pp: Share
    moe_tp: Share
    """Its part of each of its experts."""
    moe_ep: Share
    """Its part of the experts."""

    @property
    def is_first(self) -> bool:
        return self.pp.index == 0

    @property
    def is_last(self) -> bool:
        return self.pp.index == self.pp.of - 1

    def layers(self, count: int) -> range:
        """Decoder layers of this rank, numbered in the model. What does not divide goes to the first ranks.

        Before 1.0 a rest was not allowed; ``Mapping.pp_layers`` now splits as numpy does.
        """
        each, rest = divmod(count, self.pp.of)
        start = self.pp.index * each + min(self.pp.index, rest)
        return range(start, start + each + (self.pp.index < rest))

    def experts(self, count: int) -> range:
        """Routed experts of this rank; ``count`` is a multiple of ep."""
        each = count // self.moe_ep.of
        return range(self.moe_ep.index * each, (self.moe_ep.index + 1) * each)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """tp x pp ranks; within tp, experts are divided among ep groups of tp / ep ranks."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    def ranks(self) -> Iterator[Rank]:
        """rank = pp_rank * tp + tp_rank; moe_ep_rank = tp_rank % ep, moe_tp_rank = tp_rank // ep."""
        for number in range(self.world_size):
            stage, part = divmod(number, self.tp)
            yield Rank(
                number=number,
                tp=Share(index=part, of=self.tp),
                pp=Share(index=stage, of=self.pp),
                moe_tp=Share(index=part // self.ep, of=self.tp // self.ep),
                moe_ep=Share(index=part % self.ep, of=self.ep),
            )

    def to_json(self, *, is_moe: bool) -> dict[str, int]:
        """``mapping`` of config.json."""
        found = {"world_size": self.world_size, "tp_size": self.tp, "pp_size": self.pp}
        return {**found, "moe_tp_size": self.tp // self.ep, "moe_ep_size": self.ep} if is_moe else found
