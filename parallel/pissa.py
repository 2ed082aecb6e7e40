"""PiSSA's start: A and B begin as the largest singular values and vectors of W (Meng et al. 2024, arXiv:2404.02948).

With ``W = U diag(S) V^T`` and LoRA's scale ``s``: ``B0 = U_r sqrt(S_r / s)`` and ``A0 = sqrt(S_r / s) V_r^T``. The
paper then trains ``(W - s B0 A0) + s B A``. Here the base is never changed: the same sum is computed as
``W + s [B, -B0] [A; A0]``, an adapter of rank ``2 r`` whose second half is fixed. So an adapter in a checkpoint needs
no other base than the one that everybody has, nothing is lost to rounding in a 16-bit base, and going on needs no
second singular value decomposition that could come out otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from parallel.shards import Piece


def principal(weight: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The start of A and B from a whole weight.

    The largest element of each right singular vector is made positive: the decomposition leaves signs open.

    Args:
        weight: fp32 ``[out, in]`` with at least ``r`` rows and columns.
    Returns:
        A ``[r, in]`` and B ``[out, r]``.
    Example:
        >>> a, b = principal(torch.tensor([[0.0, 8.0], [1.0, 0.0]]), r=1, scale=2.0)
        >>> (2 * b @ a).abs().round(decimals=5).tolist()
        [[0.0, 8.0], [0.0, 0.0]]
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    left, values, right = left[:, :r], values[:r], right[:r]
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
    root = (values / scale).sqrt()
    return (root[:, None] * right * largest.sign()).contiguous(), (left * root * largest.sign().t()).contiguous()


def pissa_pieces(piece_a: Piece, piece_b: Piece) -> tuple[Piece, Piece, Piece, Piece]:
    """Where A, B, the fixed A0 and the fixed -B0 lie in logical tensors of rank ``2 r``; only A and B have moments."""
    trained_a, fixed_a = _halves(piece_a, 0)
    trained_b, fixed_b = _halves(piece_b, 1)
    return trained_a, trained_b, fixed_a, fixed_b


def _halves(piece: Piece, axis: int) -> tuple[Piece, Piece]:
    r = piece.shape[axis]
    shape = tuple(2 * size if at == axis else size for at, size in enumerate(piece.shape))
    fixed = piece.box.shift(tuple(r if at == axis else 0 for at in range(len(shape))))
    return replace(piece, shape=shape, state_shape=piece.shape), replace(piece, shape=shape, box=fixed)
