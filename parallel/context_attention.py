"""Causal attention over rows that are cut by context parallelism, by ring or by all-to-all.

*Ring* (Liu et al. 2023, arXiv:2310.01889): keys and values travel round the ranks while each computes its queries
against those that it holds, and merges the shares by their log-sum-exp. In the backward pass they travel once more,
and their gradients with them, back to where they belong. Beside its own a rank never holds more than the keys and
values of two others: those that it computes with and those that arrive.

*Ulysses* (Jacobs et al. 2023, arXiv:2309.14509): an all-to-all trades tokens for heads, so that each rank computes some
heads over whole rows, and another trades back. Key/value heads that the ranks do not divide are sent more than once.

The tokens of a rank are the two chunks of :class:`parallel.sequence.SequenceCut`: a whole block of keys is then either
older than a chunk of queries or newer, and what is newer is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from parallel.attention_blocks import Block, Rules, Window, kernel_for, merge
from parallel.sequence import SequenceCut, by_rank, in_order
from parallel.whole_attention import whole_attention

KINDS = ("ring", "ulysses")
_KEYS_TAG, _GRADIENTS_TAG = 0, 1


def context_attention(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], group: Any, kind: str = "ring", rules: Rules | None = None
) -> torch.Tensor:
    """Attend causally over the rows that the ranks of ``group`` hold together.

    Args:
        qkv: this rank's ``query [s, b, heads, d]``, ``key`` and ``value [s, b, groups, d]``, where ``groups`` divides
            ``heads`` and ``s`` tokens are two equal chunks of the row.
        group: the context-parallel process group.
        kind: one of ``KINDS``; for ulysses the ranks must divide ``heads``.
        rules: of the layer; scores times ``1/sqrt(d)`` by default.
    Returns:
        ``[s, b, heads, d]``, differentiable in all three.
    """
    rules = (rules or Rules(qkv[0].shape[-1] ** -0.5)).over(qkv[0].shape[0] * dist.get_world_size(group))
    if kind == "ulysses":
        return _ulysses(qkv, group, rules)
    query, key, value = (each.permute(1, 2, 0, 3) for each in qkv)
    out: torch.Tensor = _RingAttention.apply(query, key, value, group, rules)
    return out.permute(2, 0, 1, 3)


def _visible(rank: int, source: int, chunk: int) -> tuple[slice, slice, bool]:
    """Which of this rank's queries see which of ``source``'s keys, and whether causally.

    Own tokens are in the order of the row, so they attend causally as they are. Of a rank before us the first chunk is
    older than both of ours and the second newer; both chunks of a rank behind us lie between ours.
    """
    everything = slice(None)
    if source == rank:
        return everything, everything, True
    if source < rank:
        return everything, slice(0, chunk), False
    return slice(chunk, None), everything, False


class _Ring:
    """Neighbours in a group: what is passed goes to the next rank, what arrives comes from the one before."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def sources(self) -> Iterator[tuple[int, bool]]:
        """Whose keys are here in each round, and whether it is the last one."""
        for step in range(self.size):
            yield (self.rank - step) % self.size, step == self.size - 1

    def pass_on(self, tensor: torch.Tensor, tag: int) -> Callable[[], torch.Tensor]:
        """Start passing a contiguous tensor on, to be kept until the answer was called: it waits for what arrives."""
        arriving = torch.empty_like(tensor)
        ends = ((dist.isend, tensor, (self.rank + 1) % self.size), (dist.irecv, arriving, (self.rank - 1) % self.size))
        works = dist.batch_isend_irecv(
            [dist.P2POp(op, part, group=self.group, tag=tag, group_peer=peer) for op, part, peer in ends]
        )

        def arrived() -> torch.Tensor:
            for work in works:
                work.wait()
            return arriving

        return arrived

    def block(self, query: torch.Tensor, pair: torch.Tensor, source: int, rules: Rules) -> tuple[Block, slice, slice]:
        """What this rank's queries see of ``source``'s keys and values: which of the queries, and which of the keys."""
        rows, keys, causal = _visible(self.rank, source, query.shape[2] // 2)
        window = None
        if rules.window:
            row = torch.arange(self.size * query.shape[2])
            here, there = (SequenceCut(self.size, rank).take(row, 0) for rank in (self.rank, source))
            window = Window(rules.window, here[rows], there[keys])
        key, value = pair[0][:, :, keys], pair[1][:, :, keys]
        return Block(query[:, :, rows], key, value, causal, rules.scale, rules.cap, window), rows, keys


class _RingAttention(torch.autograd.Function):
    """``query [b, heads, s, d]``, ``key`` and ``value [b, groups, s, d]`` to ``[b, heads, s, d]``."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Any, rules: Rules
    ) -> torch.Tensor:
        ring, kernel = _Ring(group), kernel_for(query, rules)
        here = torch.stack([key, value]).contiguous()
        out = lse = torch.empty(0)
        for source, last in ring.sources():
            arrived = None if last else ring.pass_on(here, _KEYS_TAG)
            block, rows, _ = ring.block(query, here, source, rules)
            part, part_lse = kernel.attend(block)
            if source == ring.rank:
                out, lse = part.to(part_lse.dtype), part_lse
            else:
                merge(out[:, :, rows], lse[:, :, rows], part, part_lse)
            here = arrived() if arrived else here
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.group, ctx.rules = group, rules
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        ring, kernel = _Ring(ctx.group), kernel_for(query, ctx.rules)
        here = torch.stack([key, value]).contiguous()
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        gradients_here: Callable[[], torch.Tensor] = partial(torch.zeros_like, here, dtype=lse.dtype)
        for source, last in ring.sources():
            arrived = None if last else ring.pass_on(here, _KEYS_TAG)
            block, rows, keys = ring.block(query, here, source, ctx.rules)
            of_query, *of_keys = kernel.gradients(block, grads[0][:, :, rows], out[:, :, rows], lse[:, :, rows])
            grad_query[:, :, rows] += of_query
            gradients = gradients_here()
            for whole, share in zip(gradients, of_keys, strict=True):
                whole[:, :, keys] += share
            gradients_here = ring.pass_on(gradients, _GRADIENTS_TAG)
            here = arrived() if arrived else here
        grad_key, grad_value = gradients_here().to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None


def _ulysses(qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], group: Any, rules: Rules) -> torch.Tensor:
    size = dist.get_world_size(group)
    heads, groups = qkv[0].shape[2], qkv[1].shape[2]
    if heads % size:
        raise ValueError(f"ulysses over {size} ranks cannot deal out {heads} heads")
    copies = math.lcm(groups, size) // groups
    query, key, value = qkv
    if copies > 1:
        key, value = (each.repeat_interleave(copies, dim=2) for each in (key, value))
    widths = [heads // size, *(2 * [groups * copies // size])]
    by_owner = torch.cat([each.unflatten(2, (size, -1)) for each in (query, key, value)], dim=3)
    whole = in_order(_Exchange.apply(by_owner.permute(2, 0, 1, 3, 4).contiguous(), group))
    query, key, value = (each.permute(1, 2, 0, 3) for each in whole.split(widths, dim=2))
    out = whole_attention(query, key, value, rules)
    mine = _Exchange.apply(by_rank(out.permute(2, 0, 1, 3), size).contiguous(), group)
    return mine.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Send part ``i`` of ``[ranks, ...]`` to rank ``i``; what arrives lies in the order of the senders."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        arrived = torch.empty_like(parts)
        dist.all_to_all_single(arrived, parts, group=group)
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        back = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        dist.all_to_all_single(back, grads[0].contiguous(), group=ctx.group)
        return back, None
