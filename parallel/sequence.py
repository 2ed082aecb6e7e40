"""Where the tokens of a row sit under context parallelism: two chunks per rank, so that causal work is even.

A row is cut into ``2 * cp`` chunks; rank ``i`` holds chunk ``i`` and chunk ``2 * cp - 1 - i``. Early tokens see few
keys and late ones many, so every rank computes equally much (the split of megatron-core's rotary slices and of
transformer-engine; Llama 3, arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class SequenceError(ValueError):
    """Rows that cannot be cut; ``hint`` says to which multiple they must be padded."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class SequenceCut:
    """Which tokens of a row context-parallel rank ``rank`` of ``size`` holds."""

    size: int = 1
    rank: int = 0

    def take(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's two chunks, one after the other, along ``dim``.

        Raises:
            SequenceError: ``2 * size`` does not divide the tokens.
        Example:
            >>> SequenceCut(2, 0).take(torch.arange(8), 0).tolist(), SequenceCut(2, 1).take(torch.arange(8), 0).tolist()
            ([0, 1, 6, 7], [2, 3, 4, 5])
        """
        if self.size == 1:
            return whole
        chunks = 2 * self.size
        tokens = whole.shape[dim]
        if tokens % chunks:
            raise SequenceError(
                f"rows of {tokens} tokens cannot be cut into 2 x cp = {chunks} chunks",
                f"pad rows to a multiple of {chunks} tokens",
            )
        parts = whole.chunk(chunks, dim)
        return torch.cat([parts[self.rank], parts[-1 - self.rank]], dim)


def in_order(parts: torch.Tensor) -> torch.Tensor:
    """Put the ranks' tokens back into the order of the row.

    Args:
        parts: ``[cp, tokens / cp, ...]``, each rank's two chunks.
    Returns:
        ``[tokens, ...]``.
    Example:
        >>> in_order(torch.tensor([[0, 1, 6, 7], [2, 3, 4, 5]])).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if parts.shape[0] == 1:
        return parts[0]
    first, last = parts.chunk(2, dim=1)
    return torch.cat([first, last.flip(0)]).flatten(0, 1)


def by_rank(whole: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of :func:`in_order`: ``[tokens, ...] -> [cp, tokens / cp, ...]``."""
    first, last = whole.unflatten(0, (2, size, -1)).unbind(0)
    return torch.cat([first, last.flip(0)], dim=1)
