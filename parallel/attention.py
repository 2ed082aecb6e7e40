"""Core attention on ``scaled_dot_product_attention``: what runs without transformer-engine, on CPU and on any GPU."""

from __future__ import annotations

from typing import Any

import torch

from parallel.attention_blocks import Rules
from parallel.context_attention import context_attention
from parallel.whole_attention import whole_attention


class SdpaAttention(torch.nn.Module):
    """Causal attention over right-padded rows, with grouped key/value heads.

    Rows are padded on the right, so that a causal mask alone keeps padding out of every real position.
    Takes ``query [s, b, heads, d]``, ``key`` and ``value [s, b, groups, d]`` of this tensor-parallel rank; returns
    ``[s, b, heads * d]``. The scale is ``1/sqrt(d)`` unless ``softmax_scale`` is given. ``cap`` and ``window`` as in
    :class:`parallel.attention_blocks.Rules`.

    With context parallelism ``s`` are this rank's tokens, and ``cp_comm_type`` is megatron-core's word for how they see
    those of other ranks (:data:`parallel.context_attention.KINDS`).
    """

    def __init__(
        self,
        config: Any,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        cap: float = 0.0,
        window: int = 0,
        **_: Any,
    ) -> None:
        super().__init__()
        self.rules = Rules(softmax_scale or config.kv_channels**-0.5, cap, window)
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.context_kind = "ulysses" if cp_comm_type == "a2a" else "ring"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attend causally."""
        if self.context_group is not None:
            return context_attention((query, key, value), self.context_group, self.context_kind, self.rules).flatten(2)
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        out = whole_attention(query, key, value, self.rules)
        return out.permute(2, 0, 1, 3).flatten(2)
