"""Cross entropy over a cut vocabulary, a block of rows at a time: logits are never whole in memory.

Only rows with a label are computed. The gradient with respect to the hidden states is made together with the loss, as
in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); the reductions over the cut vocabulary are Megatron-LM's
(Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parallel.engine import IGNORED_LABEL
from parallel.fused import product

BLOCK_ELEMENTS = 1 << 24  # of logits: 64 MiB in fp32
ROWS_IN_CACHE = 8


@dataclass(frozen=True)
class VocabShard:
    """Rows ``start .. start + rows`` of the vocabulary lie on this rank; ``group`` joins the ranks that hold it all."""

    start: int
    rows: int
    group: Any = None

    @property
    def is_cut(self) -> bool:
        """Whether other ranks hold other rows."""
        return self.group is not None and dist.get_world_size(self.group) > 1

    def reduce(self, value: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """All-reduce in place over the vocabulary's ranks."""
        if self.is_cut:
            dist.all_reduce(value, op=op, group=self.group)
        return value


@dataclass(frozen=True)
class HeadAdapter:
    """What the output layer's adapter makes of the logits ``W x``, in this rank's rows of the vocabulary.

    ``low [..., r]`` of the same tokens and ``up [rows, r]``: their product is added. ``factor``: fp32 ``[rows]``, by
    which the sum is stretched (DoRA); None where nothing is. ``dropped [..., hidden]``: what ``low`` was made of, where
    that is not ``x``; the logits are then ``W x + (factor - 1) W dropped + factor * low up^T``, as in PEFT.
    """

    low: torch.Tensor
    up: torch.Tensor
    factor: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


def summed_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab: VocabShard,
    cap: float = 0.0,
    adapter: HeadAdapter | None = None,
) -> tuple[torch.Tensor, int]:
    """Sum of the cross entropies of all labelled rows.

    Args:
        hidden: ``[..., hidden]``, equal on all ranks of ``vocab.group``. Its gradient is this rank's share: the caller
            sums it over the group.
        weight: ``[>= vocab.rows, hidden]``, this rank's rows of the output layer (more rows are padding).
        labels: int64, the shape of ``hidden`` without its last axis; ``IGNORED_LABEL`` where there is none.
        cap: logits are bounded by ``cap * tanh(logit / cap)`` unless it is 0.
        adapter: of the same rows; gradients of what has tokens are this rank's share, too.
    Returns:
        The fp32 scalar sum and the count of labels.
    """
    chosen = labels != IGNORED_LABEL
    rows, targets = hidden[chosen], labels[chosen]
    if weight.shape[0] != vocab.rows:
        weight = weight[: vocab.rows]
    if adapter is None:
        inputs = _Inputs(rows, weight)
    else:
        dropped = None if adapter.dropped is None else adapter.dropped[chosen]
        inputs = _Inputs(rows, weight, adapter.low[chosen], adapter.up, adapter.factor, dropped)
    return _SummedLoss.apply(targets, vocab, cap, *inputs), int(targets.numel())


def head_logits(rows: torch.Tensor, weight: torch.Tensor, adapter: HeadAdapter | None) -> torch.Tensor:
    """Logits ``[..., padded rows]`` of this rank in fp32, with the output layer's adapter if it has one."""
    logits = (rows @ weight.t()).float()
    if adapter is not None:
        mine = logits[..., : adapter.up.shape[0]]
        mine += adapter.low.float() @ adapter.up.t().float()
        if adapter.factor is not None:
            mine *= adapter.factor
    return logits


def bound_(logits: torch.Tensor, cap: float) -> torch.Tensor | None:
    """Bound logits by ``cap * tanh(logit / cap)`` in place, if ``cap`` is not 0; returns the slope of that.

    Example:
        >>> logits = torch.tensor([0.0, 1000.0])
        >>> bound_(logits, 30.0).tolist(), logits.tolist()
        ([1.0, 0.0], [0.0, 30.0])
    """
    if not cap:
        return None
    slope = 1 - logits.div_(cap).tanh_().square()
    logits.mul_(cap)
    return slope


class _Inputs(NamedTuple):
    """What logits are made of, rows of tokens without a label left out; or the gradient of each."""

    rows: torch.Tensor | None
    weight: torch.Tensor | None
    low: torch.Tensor | None = None
    up: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


class _Head:
    """Makes logits a block of rows at a time, and adds up the gradients of what they are made of."""

    def __init__(self, inputs: _Inputs, needed: Sequence[bool]) -> None:
        self.inputs = inputs
        self.gradients = _Inputs(
            *(
                self._room(name, each) if each is not None and is_needed else None
                for name, each, is_needed in zip(_Inputs._fields, inputs, needed, strict=True)
            )
        )
        self._plain: torch.Tensor | None = None  # logits before they are stretched

    @staticmethod
    def _room(name: str, given: torch.Tensor) -> torch.Tensor:
        """For a gradient: of what has tokens it is written a block at a time, of all else added up in fp32."""
        has_tokens = name in ("rows", "low", "dropped")
        return torch.empty_like(given) if has_tokens else torch.zeros_like(given, dtype=torch.float32)

    @property
    def copies(self) -> int:
        """How many matrices of a block's size there are at a time, the gradient in the place of the logits."""
        return 1 + (self.inputs.factor is not None)

    def logits(self, part: slice) -> torch.Tensor:
        """The logits of some rows, fp32."""
        rows, weight, low, up, factor, dropped = self.inputs
        assert rows is not None and weight is not None
        logits = product(rows[part], weight.t()).float()
        if low is None or up is None:
            return logits
        if factor is None:
            return logits.addmm_(low[part].float(), up.t().float())
        if dropped is None:
            self._plain = logits.addmm_(low[part].float(), up.t().float())
            return logits * factor
        self._plain = product(dropped[part], weight.t()).float()
        logits -= self._plain
        self._plain.addmm_(low[part].float(), up.t().float())
        return logits.addcmul_(self._plain, factor)

    def backward(self, part: slice, gradient: torch.Tensor, total: torch.Tensor) -> None:
        """Add the share of some rows, whose logits were made last; ``gradient`` and ``total`` of :func:`_block_loss`.

        ``gradient`` is overwritten.
        """
        rows, weight, low, up, factor, dropped = self.inputs
        assert rows is not None and weight is not None
        if factor is not None and self._plain is not None:
            if self.gradients.factor is not None:
                self.gradients.factor.add_((self._plain.mul_(gradient).t() @ total.reciprocal()).squeeze(1))
            self._plain = None
            if dropped is not None:
                self._products(rows, self.gradients.rows, part, gradient, total)
                self._products(dropped, self.gradients.dropped, part, gradient * (factor - 1), total)
            gradient.mul_(factor)
        if low is not None and up is not None:
            if self.gradients.low is not None:
                self.gradients.low[part] = (gradient @ up.float()).div_(total)
            if self.gradients.up is not None:
                self.gradients.up.add_(gradient.t() @ low[part].float().div_(total))
        if dropped is None:
            self._products(rows, self.gradients.rows, part, gradient, total)

    def _products(
        self, rows: torch.Tensor, of_rows: torch.Tensor | None, part: slice, gradient: torch.Tensor, total: torch.Tensor
    ) -> None:
        """The gradients of ``rows[part] @ weight.t()``."""
        weight, of_weight = self.inputs.weight, self.gradients.weight
        assert weight is not None
        if of_rows is not None:
            of_rows[part] = product(gradient.to(weight.dtype), weight).div_(total)
        if of_weight is not None:
            of_weight.add_(gradient.t() @ rows[part].float().div_(total))


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, targets: torch.Tensor, vocab: VocabShard, cap: float, *given: torch.Tensor | None
    ) -> torch.Tensor:
        inputs = _Inputs(*given)
        assert inputs.rows is not None and inputs.weight is not None
        head = _Head(inputs, ctx.needs_input_grad[-len(given) :])
        loss = inputs.rows.new_zeros((), dtype=torch.float32)
        block = max(1, BLOCK_ELEMENTS // max(1, head.copies * inputs.weight.shape[0]))
        for start in range(0, len(targets), block):
            part = slice(start, start + block)
            part_loss, gradient, total = _block_loss(head.logits(part), targets[part], vocab, cap)
            loss += part_loss
            head.backward(part, gradient, total)
        ctx.gradients = [
            None if each is None or of is None else each.to(of.dtype)
            for each, of in zip(head.gradients, inputs, strict=True)
        ]
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = grads[0]
        return None, None, None, *(None if each is None else each * scale.to(each.dtype) for each in ctx.gradients)


def _block_loss(
    logits: torch.Tensor, targets: torch.Tensor, vocab: VocabShard, cap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradient of a block of logits, fp32, which are overwritten.

    Not by ``torch.softmax``, whose fast exponential on CPUs is 20 units in the last place off, and differently so for
    each cut of the vocabulary. Dividing by the total is left to the caller, for whom there is less to divide.

    Returns:
        The summed loss; the gradient with respect to this rank's logits times ``total``, fp32; ``total [rows, 1]``.
    """
    slope = bound_(logits, cap)
    top = vocab.reduce(logits.amax(dim=-1), dist.ReduceOp.MAX)
    local = targets - vocab.start
    mine = (local >= 0) & (local < vocab.rows)
    index = local.clamp(0, vocab.rows - 1).unsqueeze(1)
    target_logit = torch.where(mine, logits.gather(1, index).squeeze(1) - top, 0.0)
    total = torch.empty_like(top)
    for start in range(0, logits.shape[0], ROWS_IN_CACHE):
        part = slice(start, start + ROWS_IN_CACHE)
        total[part] = logits[part].sub_(top[part].unsqueeze(1)).exp_().sum(dim=-1)
    total, target_logit = vocab.reduce(torch.stack([total, target_logit]))
    logits.scatter_add_(1, index, -(mine * total).unsqueeze(1))
    if slope is not None:
        logits.mul_(slope)
    return (total.log() - target_logit).sum(), logits, total.unsqueeze(1)
