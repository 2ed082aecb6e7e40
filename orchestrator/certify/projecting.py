"""GaLore's moments of two runs in one basis: each run keeps them along the singular vectors of its own gradients.

Two directions turn in their plane by the gradients' rounding over the gap of their singular values (Wedin 1972), and
moments with them, though the subspace stays. So the turn is compared with what gradients within their tolerance could
make of it, and the moments with the reference's gradients as the other run's projectors project them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kept:
    """What GaLore keeps of one matrix after a step, fp64. ``projector [side, rank]``; ``first``, ``second``
    ``[rank, other side]``: Adam's moments."""

    projector: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


def carried(reference: Sequence[Kept], other: Sequence[Kept], betas: tuple[float, float]) -> list[Kept]:
    """The reference's moments as they were if it had the other run's projectors, after each step from the first on.

    Its projected gradients are what its first moments gained in a step.
    """
    before = first = second = torch.zeros_like(reference[0].first)
    found = []
    for one, there in zip(reference, other, strict=True):
        low = there.projector.t() @ one.projector @ ((one.first - betas[0] * before) / (1 - betas[0]))
        first, second = betas[0] * first + (1 - betas[0]) * low, betas[1] * second + (1 - betas[1]) * low.square()
        before = one.first
        found.append(Kept(there.projector, first, second))
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far a projector's directions are from another one's subspace, in Frobenius norm, of their length.

    Example:
        >>> round(apart(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]), 3)
        0.707
    """
    outside = one - other @ (other.t() @ one)
    return float(outside.norm() / one.norm()) if one.any() else float(other.norm())


def turned(one: Kept, other: torch.Tensor, low: torch.Tensor) -> float:
    """The error of a gradient, relative in Frobenius norm, that would turn these directions as the other run's are.

    To first order an error of size ``e`` turns directions ``i`` and ``j`` by up to ``e / |s_i - s_j|``. A direction
    that points the other way is infinitely far: signs are no matter of rounding.

    Args:
        one: of a step in which the subspace was chosen; ``low``: that step's projected gradient, whose rows are as long
            as the singular values.
    """
    values = low.norm(dim=1)
    cosines = other.t() @ one.projector
    if (cosines.diagonal() < 0).any():
        return float("inf")
    gaps = (values[:, None] - values[None, :]).abs()
    return float(((cosines.abs() - cosines.diagonal().diag()) * gaps).max() / low.norm()) if low.any() else 0.0
