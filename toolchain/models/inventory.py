"""From a list of tensors to the matrices that formats are assigned to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from toolchain.core.roles import QUANTIZABLE, Role
from toolchain.families.base import Family, Part
from toolchain.models.types import LinearInfo, TensorInfo, decoder_part

_MATMULS = (*QUANTIZABLE, Role.ROUTER, Role.LM_HEAD)


def linears_of(
    family: Family, tensors: Iterable[TensorInfo], num_hidden_layers: int
) -> tuple[LinearInfo, ...]:
    """Every matrix that a matmul of the decoder uses, in the order of ``tensors``.

    Fused experts ([E, in, 2*I] and [E, I, in], input first) count as ``experts.N.gate_proj``, ``up_proj`` and
    ``down_proj`` per expert. Embeddings, norms and whatever has the role OTHER are left out.
    """
    return tuple(linear for tensor in tensors for linear in _linears(family, tensor, num_hidden_layers))


def _linears(family: Family, tensor: TensorInfo, num_hidden_layers: int) -> Iterator[LinearInfo]:
    part = decoder_part(family, tensor.name, num_hidden_layers)
    if part.role not in _MATMULS:
        return
    if len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
        yield LinearInfo(
            name=tensor.name.removesuffix(".weight"),
            part=part,
            out_features=tensor.shape[0],
            in_features=tensor.shape[1],
            dtype=tensor.dtype,
        )
    elif len(tensor.shape) == 3 and part.role is Role.ROUTED_EXPERT:
        yield from _fused(family, tensor, part)


def _fused(family: Family, tensor: TensorInfo, part: Part) -> Iterator[LinearInfo]:
    head, _, leaf = tensor.name.rpartition(".")
    experts, in_features, out_features = tensor.shape
    gate, up, down = family.gate_up_down
    names = {"gate_up_proj": (gate, up), "down_proj": (down,)}.get(leaf, ())
    for expert in range(experts):
        for name in names:
            yield LinearInfo(
                name=f"{head}.{expert}.{name}",
                part=Part(role=part.role, layer=part.layer, expert=expert, projection=name),
                out_features=out_features // len(names),
                in_features=in_features,
                dtype=tensor.dtype,
            )


def main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """The dtype that most parameters have."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.parameters
    return counts.most_common(1)[0][0] if counts else "BF16"
