"""Choose the scale of each block by the error that it leaves."""

from __future__ import annotations

import torch

from toolchain.codecs import compiled, e2m1
from toolchain.quantize.accuracy.grids import LARGEST_CODE, Grid, Nvfp4Grid

CHUNK_ELEMENTS = 1 << 16
"""Weights that are searched at once: small enough for a core's cache, which makes the search six times faster."""
HESSIAN_CHUNK_ELEMENTS = 1 << 18
"""The same where every trial ends in a matmul."""
SURE_BELOW = 2
"""Codes under amax/6 that are always tried in the full sweep."""


def choose_scales(
    weight: torch.Tensor, grid: Grid, method: str, hessian: torch.Tensor | None = None
) -> torch.Tensor:
    """[N, K] float32 -> stored scales [N, K/group] with the least error per block.

    The error of a block d (weight minus its quantized value) is |d|^2, or d^T H d with ``hessian`` [K/group, group,
    group]: the part of the output error that the block makes on its own (ModelOpt ``local_hessian``).
    ``method`` is what ``Grid.candidates`` knows; ``mse`` is exact over every positive E4M3 code.
    """
    if hessian is None:
        if method != "mse" and isinstance(grid, Nvfp4Grid):
            found = compiled.best_scales(
                weight, grid.scale_2, list(grid.candidates(weight, method)), grid.group
            )
            if found is not None:
                return found
        rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
        if method == "mse" and isinstance(grid, Nvfp4Grid):
            return torch.cat([_sweep(part, grid) for part in weight.split(rows)])
        return torch.cat([_best(part, grid, method, None) for part in weight.split(rows)])
    # By columns: one matmul with a block's Hessian takes all rows.
    width = grid.group * max(1, HESSIAN_CHUNK_ELEMENTS // (grid.group * len(weight)))
    parts = zip(weight.split(width, dim=1), hessian.split(width // grid.group), strict=True)
    return torch.cat([_best(part, grid, method, part_hessian) for part, part_hessian in parts], dim=1)


def _best(part: torch.Tensor, grid: Grid, method: str, hessian: torch.Tensor | None) -> torch.Tensor:
    """The best of the grid's candidates for each block of [N, K]."""
    blocks = part.unflatten(-1, (-1, grid.group))
    if hessian is None:
        blocks = blocks.abs()  # grids are symmetric, but for the -8 of INT4
    best_error = best = None
    for scales in grid.candidates(part, method):
        error = block_error(blocks, grid, scales, hessian)
        raw = scales.view(torch.uint8) if scales.element_size() == 1 else scales
        if best_error is None or best is None:
            best_error, best, kind = error, raw, scales.dtype
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, raw, best)
    assert best is not None
    return best.view(kind)


def block_error(
    blocks: torch.Tensor, grid: Grid, scales: torch.Tensor, hessian: torch.Tensor | None
) -> torch.Tensor:
    """[N, B, group] under ``scales`` [N, B] -> error of each block [N, B]."""
    factor = grid.factors(scales)
    scaled = blocks / factor.unsqueeze(-1)
    difference = grid.round(scaled).sub_(scaled)
    if hessian is None:
        return difference.square_().sum(-1).mul_(factor.square())
    by_block = difference.mul_(factor.unsqueeze(-1)).transpose(0, 1).contiguous()
    return torch.bmm(by_block, hessian).mul_(by_block).sum(-1).T


def _sweep(part: torch.Tensor, grid: Nvfp4Grid) -> torch.Tensor:
    """Exact over all codes without trying them all.

    Above: where 6 * scale/2 reaches the block's amax, every value of the grid of ``scale`` below amax is also one of
    ``scale/2`` (E2M1 is closed under doubling), so that nothing beyond one doubling (8 codes of E4M3) can be better.
    Below: the largest element is clipped by amax - 6 * scale, and the search ends where that alone is too much.
    """
    blocks = part.unflatten(-1, (-1, grid.group)).abs()
    amax = blocks.amax(-1)
    codes = grid.base(part).view(torch.uint8).int()
    best, error = codes.clone(), block_error(blocks, grid, _stored(codes), None)

    def attempt(offset: int, mask: torch.Tensor | None = None) -> None:
        trial = (codes + offset).clamp_(1, LARGEST_CODE)
        if mask is None:
            found = block_error(blocks, grid, _stored(trial), None)
            better = found < error
        else:
            better = torch.zeros_like(mask)
            found = error.clone()
            found[mask] = block_error(
                blocks[mask].unsqueeze(1), grid, _stored(trial[mask].unsqueeze(1)), None
            ).squeeze(1)
            better = mask & (found < error)
        error.copy_(torch.where(better, found, error))
        best.copy_(torch.where(better, trial, best))

    for offset in (*range(1, 9), *range(-1, -SURE_BELOW - 1, -1)):
        attempt(offset)
    offset = -SURE_BELOW - 1
    while True:
        trial = (codes + offset).clamp(min=1)
        clipped = (amax - e2m1.E2M1_MAX * grid.factors(_stored(trial))).clamp_(min=0).square_()
        mask = (codes + offset >= 1) & (clipped < error)
        if not mask.any():
            break
        attempt(offset, mask)
        offset -= 1
    # Among the smallest codes E4M3 is linear, not logarithmic: a doubling may be more than 8 codes away.
    for offset in range(9, 17):
        mask = (codes < 16) & (codes + offset <= LARGEST_CODE)
        if mask.any():
            attempt(offset, mask)
    return _stored(best)


def _stored(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def block_hessian(gram: torch.Tensor, group: int) -> torch.Tensor:
    """[K, K] -> its diagonal blocks [K/group, group, group]."""
    blocks = gram.unflatten(0, (-1, group)).unflatten(-1, (-1, group))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
