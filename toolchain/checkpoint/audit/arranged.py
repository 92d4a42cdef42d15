"""Channels between gate/up and down in another order than in the source, as recipe ``arrange`` puts them.

Nothing is stored that would say the order: it is read off the bytes. The rows of a quantized gate are those of the
source, rounded, so that each has one nearest; rows of up that were doubled are those of the source times a power of
two; and down must be the source's with just these columns and the inverse of these factors. An order that is wrong
anywhere leaves a matrix further from its source than rounding can be, which is a finding as in any other checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.codecs import get_codec
from toolchain.families import Family
from toolchain.formats import Format

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

GATE, UP, DOWN = range(3)
PLAIN = ("gate_proj", "up_proj", "down_proj")
SKETCH = 64
"""Random directions on which rows are compared first: rounded rows are at most a tenth away, others far."""
RECIPE = "arrange"


class ArrangedSource:
    """What the source's matrices are in the order of the checkpoint. Ask for gate, then up, then down of an MLP, of
    what is not the source's as it stands, and of what ``expects`` says."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._orders: dict[str, torch.Tensor] = {}
        self._powers: dict[str, torch.Tensor] = {}

    def part(self, name: str) -> int | None:
        """Which of gate, up and down ``name`` is (module name in the checkpoint), None for anything else."""
        last = name.rpartition(".")[2]
        for names in (self._family.gate_up_down, PLAIN):
            if last in names:
                return names.index(last)
        return None

    def expects(self, name: str) -> bool:
        """True when matrices of this MLP that came before are in another order, or scaled: this must be, too."""
        mlp = name.rpartition(".")[0]
        return self.part(name) in (UP, DOWN) and (mlp in self._orders or mlp in self._powers)

    def arranged(
        self, name: str, found: Format, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor
    ) -> torch.Tensor:
        """``weight`` [out, in] of the source as the checkpoint has it, which stores ``tensors`` for it."""
        import torch

        mlp, part = name.rpartition(".")[0], self.part(name)
        if part is None:
            return weight
        if part == DOWN:
            order = self._orders.pop(mlp, torch.arange(weight.shape[1])).long()
            powers = self._powers.pop(mlp, torch.ones(len(order)))
            return weight[:, order] / powers.to(weight.dtype)
        decoded = get_codec(found.name).unpack(dict(tensors), torch.float32)
        if part == GATE:
            order = row_order(decoded, weight.float())
            if order is None:
                return weight
            self._orders[mlp] = order.int()
            return weight[order]
        order = self._orders.get(mlp, torch.arange(len(weight))).long()
        self._powers[mlp] = powers = row_powers(decoded, weight[order].float())
        return weight[order] * powers.to(weight.dtype).unsqueeze(-1)


def row_order(decoded: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
    """[N] int64: row i of ``decoded`` [N, K] is row ``order[i]`` of ``source``, rounded. None where no order fits."""
    import torch

    directions = torch.randn(source.shape[1], SKETCH, generator=torch.Generator().manual_seed(0))
    for sketched in (True, False):
        rows, others = (
            torch.nn.functional.normalize(item @ directions if sketched else item)
            for item in (decoded, source)
        )
        order = (rows @ others.T).argmax(1)
        if len(order.unique()) == len(order):
            return order
    return None


def row_powers(decoded: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """[N] float32: the power of two nearest to what each row of ``source`` must be multiplied with."""
    import torch

    ratio = torch.linalg.vector_norm(decoded, dim=1) / torch.linalg.vector_norm(source, dim=1)
    usable = ratio.isfinite() & (ratio > 0)
    return torch.where(usable, ratio, torch.ones_like(ratio)).log2().round().exp2()
