"""Balancing experts so that no cut of the batch changes it: a loss for each sequence, and biases of the choice.

For users of other tools there is the loss of a whole micro-batch too, which does depend on what shares one.

Of a sequence with T positions, E experts and K chosen per token (DeepSeek-AI 2024, arXiv:2412.19437, eq. 17 to 20):
``loss = E / (K T) * sum_e count_e * (sum_t p_te) / T``, where ``p`` are the router's scores, which sum to 1. It is 1
when all experts are used alike. Positions are those up to the last with a label: what comes after cannot change the
model's loss, and padding comes after. A sequence weighs as much as its label tokens, as it does in the model's loss.
Of a micro-batch the formula is the same, over the positions and the label tokens of all its sequences (Fedus et al.
2021, arXiv:2101.03961, eq. 4 to 6): with one sequence in each it is the same loss.

A bias of the choice goes up by a fixed step where fewer than the mean of the whole global batch's positions chose its
expert, and down where more did (Wang et al. 2024, arXiv:2408.15664, algorithm 1).
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
class Positions:
    """Which of this rank's tokens count.

    Args:
        cut: which tokens of a row context-parallel ranks hold; of those this rank has the ``part``-th of ``parts``.
    """

    clock: BalancingClock
    cut: SequenceCut
    parts: int = 1
    part: int = 0

    def counts(self, chosen: torch.Tensor, tokens: int) -> torch.Tensor:
        """How many of them chose each expert, fp32 ``[b, E]``, of a choice ``[s * b, E]``."""
        return (chosen.unflatten(0, (tokens, -1)) * self.seen(tokens, chosen.device)).sum(dim=0)

    def seen(self, tokens: int, device: torch.device) -> torch.Tensor:
        """1 where a token counts, else 0, ``[s, b, 1]``."""
        row = self.cut.take(torch.arange(tokens * self.parts * self.cut.size, device=device), 0)
        places = row[self.part * tokens :][:tokens]
        return (places[:, None] < self.clock.now().positions.to(device)).float()[..., None]


@dataclass(frozen=True)
class Balance:
    """Adds ``coefficient`` times the loss of its router, summed over a micro-batch's label tokens, to the run's loss.

    Args:
        groups: of ranks that hold different tokens of the same sequences.
        over: what it is a loss of, ``sequence`` or ``micro_batch``.
    """

    coefficient: float
    positions: Positions
    groups: tuple[Any, ...] = ()
    over: str = "sequence"

    def __call__(self, scores: torch.Tensor, chosen: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Attach the loss.

        Args:
            scores: ``[s, b, E]`` of this rank's tokens, which sum to 1; chosen: bool ``[s * b, E]``.
            probabilities: any tensor on the way to the model's loss; returned as it is.
        """
        tokens, _, experts = scores.shape
        counts = self.positions.counts(chosen, tokens)
        for group in self.groups:
            dist.all_reduce(counts, group=group)
        sequences = self.positions.clock.now()
        sums = (scores * self.positions.seen(tokens, scores.device)).sum(dim=0)
        length = sequences.positions.to(scores.device).clamp(min=1).float()
        labels = sequences.labels.to(scores.device)
        if self.over == "micro_batch":
            counts, sums, length, labels = (each.sum(dim=0, keepdim=True) for each in (counts, sums, length, labels))
        per_token = chosen[0].sum()
        losses = (counts * sums).sum(dim=-1) * experts / (per_token * length**2)
        return _Attach.apply(probabilities, self.coefficient * (losses * labels).sum())


class ChoiceCounts:
    """How often each expert of a router was chosen since the last step.

    Under activation recompute only the second forward pass counts, as only that has gradients.
    """

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self._sum: torch.Tensor | None = None

    def add(self, chosen: torch.Tensor, tokens: int) -> None:
        """Count a micro-batch's choice ``[s * b, E]`` of ``s`` = ``tokens``."""
        counts = self.positions.counts(chosen, tokens).sum(dim=0)
        self._sum = counts if self._sum is None else self._sum + counts

    def shift_(self, bias: torch.Tensor, rate: float, group: Any) -> None:
        """Move a bias ``[E]`` by ``rate`` towards experts that too few chose; ``group`` holds the global batch."""
        counts = torch.zeros_like(bias) if self._sum is None else self._sum
        dist.all_reduce(counts, group=group)
        bias.add_((counts.mean() - counts).sign(), alpha=rate)
        self._sum = None


class _Attach(torch.autograd.Function):
    """Passes a tensor on, and gives a scalar loss beside it the gradient 1."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], torch.ones_like(ctx.saved_tensors[0])
