"""GaLore's arithmetic on one matrix: the subspace of a gradient, and a step of Adam in it.

Zhao et al. 2024 (arXiv:2403.03507), algorithm 2: with P the first left singular vectors of some step's gradient G, Adam
sees ``R = P^T G``, and the weight moves by ``scale * P N``, where N is what Adam makes of R. Moments keep their values
when P is chosen anew. Here G always has its projected side first: it is transposed where columns are projected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding of fp32: Adam would divide them by their own size."""
BLOCK = 1024  # of a matrix's longer side that is in fp64 at a time


def subspace(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """The directions of the largest singular values of a gradient whose projected side is its first.

    A decomposition leaves the signs open; here a direction has a positive product with ``1, 2, 3, ...``. Directions in
    which there is nothing but rounding are zero: what another order of summing makes of them would be another run. Of a
    gradient that is not finite no direction is a number.

    Directions turn in each other's plane by rounding over the gap of their singular values, and moments are kept along
    them: so the rounding is the gradient's own, and none of the decomposition, which is in fp64.

    Args:
        gradient: fp32 ``[side, other]``.
    Returns:
        fp32 ``[side, rank]`` with orthonormal or zero columns, in its own memory.
    Example:
        >>> subspace(torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, 2.0]]), rank=1).tolist()
        [[1.0], [0.0]]
    """
    if not gradient.isfinite().all():
        return gradient.new_full((len(gradient), rank), float("nan"))
    left, values = _left_singular(gradient, rank)
    along = torch.arange(1, len(left) + 1, device=left.device, dtype=left.dtype) @ left
    signs = torch.where(along < 0, -1.0, 1.0) * (values > NEGLIGIBLE * values[0])
    return (left * signs).float().contiguous()


def _left_singular(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first left singular vectors ``[side, rank]`` and values of an fp32 matrix, in fp64.

    By the eigenvectors of the shorter side's Gram matrix: that is exact to fp64, costs less than a decomposition of the
    matrix in fp32, and needs no copy of the matrix in fp64. Values below 1e-8 of the largest are noise.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if is_wide else matrix.t()
    gram = matrix.new_zeros(len(short), len(short), dtype=torch.float64)
    for block in short.split(BLOCK, dim=1):
        wide = block.double()
        gram.addmm_(wide, wide.t())
    squares, vectors = torch.linalg.eigh(gram)
    values, vectors = squares[-rank:].flip(0).clamp(min=0).sqrt(), vectors[:, -rank:].flip(1)
    if is_wide:
        return vectors, values
    sizes = values.clamp(min=max(float(values[0]) * NEGLIGIBLE, torch.finfo(torch.float64).tiny))
    return torch.cat([rows.double() @ vectors for rows in matrix.split(BLOCK)]) / sizes, values


@dataclass(frozen=True)
class AdamStep:
    """What Adam's formulas need besides gradient and moments. ``number`` counts steps from 1."""

    number: int
    betas: tuple[float, float]
    eps: float


def normed(low: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: AdamStep) -> torch.Tensor:
    """Adam's update for a learning rate of 1 (Kingma and Ba 2015, algorithm 1); the moments are changed.

    Example:
        >>> moments = torch.zeros(1), torch.zeros(1)
        >>> normed(torch.tensor([-0.5]), *moments, AdamStep(1, (0.9, 0.999), 0.0)).round(decimals=4).item()
        -1.0
    """
    exp_avg.lerp_(low, 1 - step.betas[0])
    exp_avg_sq.mul_(step.betas[1]).addcmul_(low, low, value=1 - step.betas[1])
    size = (exp_avg_sq / (1 - step.betas[1] ** step.number)).sqrt_().add_(step.eps)
    return exp_avg / (1 - step.betas[0] ** step.number) / size
