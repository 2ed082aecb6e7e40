"""The rotary embedding of a model in megatron-core's place for it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from parallel.rotary import angles
from parallel.sequence import SequenceCut


class Rotary(RotaryEmbedding):
    """Angles made anew for each micro-batch, which costs nothing beside a layer.

    The parent's ``forward`` is cached for the whole class (``lru_cache``), and so keeps modules and their process
    groups alive after their engine is gone; under gloo with three polling threads each.

    Args:
        turns: of :func:`parallel.rotary.frequencies`.
        cut: which tokens of a row this rank holds.
    """

    def __init__(self, turns: torch.Tensor, cut: SequenceCut) -> None:
        torch.nn.Module.__init__(self)
        self.register_buffer("turns", turns, persistent=False)
        self.cut = cut

    def forward(self, max_seq_len: int, *_: Any, **__: Any) -> torch.Tensor:
        """``[tokens of this rank, 1, 1, head_dim]`` for rows of ``max_seq_len`` tokens."""
        turns: Any = self.turns
        return angles(turns, max_seq_len, self.cut)
