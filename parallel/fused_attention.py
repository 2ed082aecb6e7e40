"""Causal self-attention for CPUs from the fused q|k|v output to the heads' outputs, rotary embedding included.

torch's flash attention for CPUs works on tiles of 32 queries, too small for its matrix products (its backward pass
takes twice to three times as long as these). Here a tile is 128 queries of all heads that share a key/value head, so
that grouped heads need no repeated keys either. Probabilities are made again in the backward pass (Dao et al. 2022,
arXiv:2205.14135, section 3.1), so that memory grows with the number of tokens and not with its square. Scores and
probabilities are fp32 also where the model is bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch.autograd.function import once_differentiable

from parallel.attention import SdpaAttention
from parallel.attention_blocks import Rules
from parallel.rotary import angles, frequencies
from parallel.sequence import SequenceCut

TILE_TOKENS = 128


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention with room for a layer's own rotary base, and a faster middle on CPUs.

    ``rope_theta``: the layer's rotary base, where it is not the model's. The middle is done by :func:`causal_attention`
    on a CPU, without norms on queries and keys, recompute of the core attention or context parallelism, and where
    nothing but causality bounds scores or hides keys.
    """

    def __init__(self, *args: Any, rope_theta: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = frequencies(rope_theta, self.hidden_size_per_attention_head) if rope_theta else None
        self.register_buffer("turns", own, persistent=False)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any, **inputs: Any) -> Any:
        """``[s, b, hidden] -> ([s, b, hidden], bias)``, as the parent does."""
        rotary = inputs.get("rotary_pos_emb")
        if self.turns is not None and rotary is not None:
            cp = self.pg_collection.cp
            rotary = angles(self.turns, rotary.shape[0] * cp.size(), SequenceCut(cp.size(), cp.rank()))
            inputs["rotary_pos_emb"] = rotary
        if rotary is None or not self._can_fuse(hidden_states, rotary):
            return super().forward(hidden_states, attention_mask, **inputs)
        mixed, _ = self.linear_qkv(hidden_states)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads = mixed.view(*mixed.shape[:2], groups, -1, width)
        return self.linear_proj(causal_attention(heads, rotary[:, 0, 0]))

    def _can_fuse(self, hidden: torch.Tensor, rotary: Any) -> bool:
        return (
            hidden.device.type == "cpu"
            and isinstance(rotary, torch.Tensor)
            and rotary.shape[-1] == self.hidden_size_per_attention_head
            and not self.checkpoint_core_attention
            and all(norm is None or isinstance(norm, IdentityOp) for norm in (self.q_layernorm, self.k_layernorm))
            and self.config.num_query_groups >= self.world_size
            and self.config.context_parallel_size == 1
            and isinstance(self.core_attention, SdpaAttention)
            and self.core_attention.rules.over(rotary.shape[0]) == Rules(self.hidden_size_per_attention_head**-0.5)
        )


def causal_attention(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate queries and keys (Su et al. 2021, arXiv:2104.09864, in halves), then attend causally, scaled by 1/sqrt(d).

    Args:
        heads: ``[s, b, groups, queries + 2, d]``: of each group its queries, its key, its value.
        angles: fp32 ``[s, d]``, the second half equal to the first.
    Returns:
        ``[s, b, groups * queries * d]``.
    """
    half = angles[:, : angles.shape[1] // 2]
    return _CausalAttention.apply(heads, half.cos().to(heads.dtype), half.sin().to(heads.dtype))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        tokens, batch, groups, slots, width = heads.shape
        repeat = slots - 2
        by_group = heads.permute(1, 2, 0, 3, 4)
        query = heads.new_empty(batch, groups, tokens, repeat, width)
        key = heads.new_empty(batch, groups, tokens, width)
        _rotate(by_group[..., :repeat, :], cos[:, None], sin[:, None], query)
        _rotate(by_group[..., repeat, :], cos, sin, key)
        query = query.mul_(width**-0.5).view(batch * groups, tokens * repeat, width)
        key = key.view(batch * groups, tokens, width)
        value = by_group[..., repeat + 1, :].reshape(batch * groups, tokens, width)
        out = torch.empty_like(query)
        for rows, end in _tiles(tokens, repeat):
            chances = _chances(query[:, rows], key[:, :end], repeat)
            out[:, rows] = chances.to(heads.dtype) @ value[:, :end]
        ctx.save_for_backward(query, key, value, cos, sin)
        ctx.shape = heads.shape
        by_token = out.view(batch, groups, tokens, repeat, width).permute(2, 0, 1, 3, 4)
        return by_token.reshape(tokens, batch, groups * repeat * width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, cos, sin = ctx.saved_tensors
        tokens, batch, groups, slots, width = ctx.shape
        repeat = slots - 2
        grad_out = grads[0].view(tokens, batch, groups, repeat, width).permute(1, 2, 0, 3, 4).reshape(query.shape)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(each, dtype=_wide(each)) for each in (key, value))
        for rows, end in _tiles(tokens, repeat):
            chances = _chances(query[:, rows], key[:, :end], repeat)
            grad_tile = grad_out[:, rows]
            grad_value[:, :end] += chances.to(value.dtype).mT @ grad_tile
            grad_chances = grad_tile.to(chances.dtype) @ value[:, :end].to(chances.dtype).mT
            scores = torch._softmax_backward_data(grad_chances, chances, -1, chances.dtype).to(key.dtype)
            grad_query[:, rows] = scores @ key[:, :end]
            grad_key[:, :end] += scores.mT @ query[:, rows]
        heads = key.new_empty(ctx.shape)
        by_group = heads.permute(1, 2, 0, 3, 4)
        grad_query = grad_query.mul_(width**-0.5).view(batch, groups, tokens, repeat, width)
        by_token = (batch, groups, tokens, width)
        _rotate(grad_query, cos[:, None], -sin[:, None], by_group[..., :repeat, :])
        _rotate(grad_key.to(key.dtype).view(by_token), cos, -sin, by_group[..., repeat, :])
        by_group[..., repeat + 1, :] = grad_value.view(by_token)
        return heads, None, None


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _tiles(tokens: int, repeat: int) -> list[tuple[slice, int]]:
    """For each tile its rows (``repeat`` queries per token) and the end of the keys that they see."""
    starts = range(0, tokens, TILE_TOKENS)
    ends = [min(start + TILE_TOKENS, tokens) for start in starts]
    return [(slice(start * repeat, end * repeat), end) for start, end in zip(starts, ends, strict=True)]


def _chances(query: torch.Tensor, key: torch.Tensor, repeat: int) -> torch.Tensor:
    """Attention probabilities of a tile that ends with the last key, fp32 (or wider) ``[batch, rows, keys]``."""
    scores = query.to(_wide(query)) @ key.to(_wide(key)).mT
    tokens = query.shape[1] // repeat
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
    diagonal = scores[..., -tokens:].unflatten(1, (tokens, repeat))
    diagonal.masked_fill_(hidden[:, None], -torch.inf)
    return torch.softmax(scores, dim=-1)


def _rotate(value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Rotate the pairs ``(x[i], x[i + d/2])``; ``-sin`` turns back."""
    first, second = value.chunk(2, dim=-1)
    low, high = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
