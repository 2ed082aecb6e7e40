"""Cross entropy over a cut vocabulary, a block of rows at a time: logits are never whole in memory.

Only rows with a label are computed. The gradient with respect to the hidden states is made together with the loss, as
in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); the reductions over the cut vocabulary are Megatron-LM's
(Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def summed_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab: VocabShard,
    cap: float = 0.0,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, int]:
    """Sum of the cross entropies of all labelled rows.

    Args:
        hidden: ``[..., hidden]``, equal on all ranks of ``vocab.group``. Its gradient is this rank's share: the caller
            sums it over the group.
        weight: ``[>= vocab.rows, hidden]``, this rank's rows of the output layer (more rows are padding).
        labels: int64, the shape of ``hidden`` without its last axis; ``IGNORED_LABEL`` where there is none.
        cap: logits are bounded by ``cap * tanh(logit / cap)`` unless it is 0.
        adapter: ``low [..., r]`` of the same rows and ``up [vocab.rows, r]``, whose product is added to the logits.
    Returns:
        The fp32 scalar sum and the count of labels.
    """
    chosen = labels != IGNORED_LABEL
    rows, targets = hidden[chosen], labels[chosen]
    if weight.shape[0] != vocab.rows:
        weight = weight[: vocab.rows]
    low, up = (None, None) if adapter is None else (adapter[0][chosen], adapter[1])
    return _SummedLoss.apply(rows, weight, low, up, targets, vocab, cap), int(targets.numel())


def head_logits(
    rows: torch.Tensor, weight: torch.Tensor, adapter: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Logits ``[..., padded rows]`` of this rank in fp32, with the output layer's adapter if it has one."""
    logits = (rows @ weight.t()).float()
    if adapter is not None:
        low, up = adapter
        logits[..., : up.shape[0]] += low.float() @ up.t().float()
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


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        low: torch.Tensor | None,
        up: torch.Tensor | None,
        targets: torch.Tensor,
        vocab: VocabShard,
        cap: float,
    ) -> torch.Tensor:
        need_rows, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_low = torch.empty_like(low) if low is not None else None
        grad_up = torch.zeros_like(up, dtype=torch.float32) if up is not None else None
        grad_rows = torch.empty_like(rows) if need_rows else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = rows.new_zeros((), dtype=torch.float32)
        block = max(1, BLOCK_ELEMENTS // max(1, weight.shape[0]))
        for start in range(0, rows.shape[0], block):
            part = slice(start, start + block)
            logits = product(rows[part], weight.t()).float()
            if low is not None and up is not None:
                logits.addmm_(low[part].float(), up.t().float())
            part_loss, gradient, total = _block_loss(logits, targets[part], vocab, cap)
            loss += part_loss
            if low is not None and up is not None and grad_low is not None and grad_up is not None:
                grad_low[part] = (gradient @ up.float()).div_(total)
                grad_up += gradient.t() @ low[part].float().div_(total)
            if grad_rows is not None:
                grad_rows[part] = product(gradient.to(weight.dtype), weight).div_(total)
            if grad_weight is not None:
                grad_weight += gradient.t() @ rows[part].float().div_(total)
        found = (grad_rows, grad_weight, grad_low, grad_up)
        inputs = (rows, weight, low, up)
        ctx.gradients = [
            None if each is None or of is None else each.to(of.dtype) for each, of in zip(found, inputs, strict=True)
        ]
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = grads[0]
        return *(None if each is None else each * scale.to(each.dtype) for each in ctx.gradients), None, None, None


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
