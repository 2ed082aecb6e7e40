"""Core attention on ``scaled_dot_product_attention``: what runs without transformer-engine, on CPU and on any GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from parallel.context_attention import context_attention


class SdpaAttention(torch.nn.Module):
    """Causal attention over right-padded rows, with grouped key/value heads.

    Rows are padded on the right, so that a causal mask alone keeps padding out of every real position.
    Takes ``query [s, b, heads, d]``, ``key`` and ``value [s, b, groups, d]`` of this tensor-parallel rank; returns
    ``[s, b, heads * d]``. The scale is ``1/sqrt(d)`` unless ``softmax_scale`` is given.

    With context parallelism ``s`` are this rank's tokens, and ``cp_comm_type`` is megatron-core's word for how they see
    those of other ranks (:data:`parallel.context_attention.KINDS`).
    """

    def __init__(
        self,
        config: Any,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
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
        tokens, batch, heads, width = query.shape
        if self.context_group is not None:
            qkv = (query, key, value)
            return context_attention(qkv, self.context_group, self.context_kind, self.softmax_scale).flatten(2)
        repeat = heads // key.shape[2]
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        if repeat > 1:
            key, value = (each.repeat_interleave(repeat, dim=1) for each in (key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(tokens, batch, heads * width)
