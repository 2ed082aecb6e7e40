"""The load-balancing loss of a router, sequence by sequence, so that no cut of the batch changes it.

Of a sequence with T positions, E experts and K chosen per token (DeepSeek-AI 2024, arXiv:2412.19437, eq. 17 to 20):
``loss = E / (K T) * sum_e count_e * (sum_t p_te) / T``, where ``p`` is the softmax over all experts. It is 1 when all
experts are used alike. Positions are those up to the last with a label: what comes after cannot change the model's
loss, and padding comes after. A sequence weighs as much as its label tokens, as it does in the model's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.engine import IGNORED_LABEL
from parallel.sequence import SequenceCut


@dataclass(frozen=True)
class Sequences:
    """What counts of each sequence of a micro-batch: ``positions`` up to the last label, and ``labels``, ``[b]``."""

    positions: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor) -> Sequences:
        """Those of ``labels [b, s]``.

        Example:
            >>> Sequences.of(torch.tensor([[-100, 5, -100, 7, -100]])).positions.tolist()
            [4]
        """
        learned = labels != IGNORED_LABEL
        places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        return cls((learned * places).amax(dim=1), learned.sum(dim=1))


class BalancingClock:
    """Tells routers which sequences are being computed.

    As ``parallel.seeding.DropoutClock`` does: a micro-batch's number is the seed of torch's default generator, which
    activation recompute restores.
    """

    def __init__(self) -> None:
        self._sequences: dict[int, Sequences] = {}

    def announce(self, number: int, labels: torch.Tensor) -> None:
        """Micro-batch ``number`` has these labels ``[b, s]``."""
        self._sequences[number] = Sequences.of(labels)

    def now(self) -> Sequences:
        """The sequences of the micro-batch in hand."""
        return self._sequences[torch.initial_seed()]


@dataclass(frozen=True)
class Balance:
    """Adds ``coefficient`` times the loss of its router, summed over a micro-batch's label tokens, to the run's loss.

    Args:
        cut: which tokens of a row context-parallel ranks hold; of those this rank has the ``part``-th of ``parts``.
        groups: of ranks that hold different tokens of the same sequences.
    """

    coefficient: float
    clock: BalancingClock
    cut: SequenceCut
    parts: int = 1
    part: int = 0
    groups: tuple[Any, ...] = ()

    def __call__(self, logits: torch.Tensor, chosen: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Attach the loss.

        Args:
            logits: ``[s, b, E]`` of this rank's tokens; chosen: bool ``[s * b, E]``.
            probabilities: any tensor on the way to the model's loss; returned as it is.
        """
        tokens, batch, experts = logits.shape
        sequences = self.clock.now()
        row = self.cut.take(torch.arange(tokens * self.parts * self.cut.size, device=logits.device), 0)
        places = row[self.part * tokens :][:tokens]
        seen = (places[:, None] < sequences.positions.to(logits.device)).float()[..., None]
        counts = (chosen.view(tokens, batch, experts) * seen).sum(dim=0)
        for group in self.groups:
            dist.all_reduce(counts, group=group)
        sums = (logits.float().softmax(dim=-1) * seen).sum(dim=0)
        length = sequences.positions.to(logits.device).clamp(min=1).float()
        per_token = chosen[0].sum()
        losses = (counts * sums).sum(dim=-1) * experts / (per_token * length**2)
        total = self.coefficient * (losses * sequences.labels.to(logits.device)).sum()
        return _Attach.apply(probabilities, total)


class _Attach(torch.autograd.Function):
    """Passes a tensor on, and gives a scalar loss beside it the gradient 1."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], torch.ones_like(ctx.saved_tensors[0])
