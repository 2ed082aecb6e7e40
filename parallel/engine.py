"""The engine protocol: one optimizer step wide, so that every engine can keep it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from parallel.galore_spec import GaloreSpec
from parallel.lora_spec import LoraSpec
from parallel.shards import Box, Shard
from parallel.specs import ModelSpec

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
NO_SAMPLE = -1


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward pass on one data-parallel rank.

    Args:
        tokens: int64 ``[sequences, tokens]``, right-padded.
        labels: int64 of the same shape, already shifted: ``labels[b, t]`` is the token that position ``t`` must
            predict; ``IGNORED_LABEL`` where nothing is learned.
        sample_ids: position of each row in the run's global sample order (unique in a run); seeds dropout.
            ``NO_SAMPLE`` of a row that is padding alone: it has no label, and so no weight in the step.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    sample_ids: tuple[int, ...]


@dataclass(frozen=True)
class AdamSpec:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101). ``clip_norm`` 0: the norm is measured, nothing clipped.

    ``distributed``: moments are cut over data-parallel ranks (megatron-core's distributed optimizer).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    distributed: bool = False


@dataclass(frozen=True)
class EngineSpec:
    """All that an engine needs to know besides its groups and its weights.

    Args:
        stages: layer indices of each pipeline chunk, ``stages[virtual * pp + stage]``.
        lora: None means full fine-tuning.
        cp_comm: how context-parallel ranks see each other's tokens (``parallel.context_attention.KINDS``).
        sequence_tokens: the longest row of the run.
        balancing_loss: coefficient of the routers' balancing loss (``parallel.balancing``); 0 for none.
        balancing_over: what that is a loss of, ``sequence`` or ``micro_batch``.
        capacity_factor: an expert takes so many times its share of a rank's tokens, not more; None: it takes all.
        bias_rate: by how much a step moves the biases of the choice of experts (``parallel.balancing``); 0: they stay.
        quantise: how the base's linears are stored, "nf4" or None.
        frozen: names of weights that full tuning leaves as they are.
        lr_ratios: names of weights with their learning rates in units of the run's, in full tuning; others have 1.
        galore: the layers' linears are stepped in projections of their gradients, in full tuning; None: by plain AdamW.
    """

    model: ModelSpec
    stages: tuple[tuple[int, ...], ...]
    lora: LoraSpec | None
    adam: AdamSpec = field(default_factory=AdamSpec)
    vpp: int | None = None
    sp: bool = False
    precision: str = "fp32"
    recompute: str = "none"
    seed: int = 0
    sequence_tokens: int = 512
    cp_comm: str = "ring"
    balancing_loss: float = 0.0
    balancing_over: str = "sequence"
    capacity_factor: float | None = None
    bias_rate: float = 0.0
    quantise: str | None = None
    frozen: frozenset[str] = frozenset()
    lr_ratios: Mapping[str, float] = field(default_factory=dict)
    galore: GaloreSpec | None = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; equal on every rank.

    ``loss`` is the mean over all label tokens of the *global* batch; ``label_tokens`` their count; ``grad_norm`` the
    2-norm of the whole gradient before clipping. ``applied``: whether the model has learned from it.
    """

    loss: float
    label_tokens: int
    grad_norm: float
    applied: bool = True


Accepts = Callable[[float, float], bool]
"""(loss, gradient norm) of a step, before its update -> whether the model shall learn from it."""


def always(loss: float, grad_norm: float) -> bool:
    """Learn from every step."""
    return True


class TensorReader(Protocol):
    """Reads boxes of logical tensors: a Hugging Face folder or a checkpoint."""

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """Read one box (a new tensor of shape ``box.size``, on the CPU, in the stored type).

        Raises:
            KeyError: there is no such tensor.
        """
        ...

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """The whole logical shape. Raises KeyError when there is no such tensor."""
        ...


class Engine(Protocol):
    """A sharded model with its adapters and optimizer on this rank."""

    def train_step(
        self, microbatches: Sequence[MicroBatch], learning_rate: float, accepts: Accepts = always
    ) -> StepResult:
        """Run one optimizer step over this data-parallel rank's micro-batches.

        All pp, cp and tp ranks get the same whole rows; context parallelism cuts them here. What ``accepts`` refuses
        changes nothing; it says the same on every rank.
        """
        ...

    def evaluate(self, microbatches: Sequence[MicroBatch]) -> StepResult:
        """The loss of these micro-batches without learning; ``grad_norm`` is 0."""
        ...

    def shards(self) -> Iterator[Shard]:
        """Every trained tensor and its optimizer moments that this rank holds, in an order fixed per topology."""
        ...

    def load(self, reader: TensorReader, *, moments: bool) -> None:
        """Fill all that :meth:`shards` yields from ``reader``; without moments, weights only (optimizer restarts)."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that the moments have seen (Adam's bias correction)."""
        ...

    def set_optimizer_steps(self, steps: int) -> None:
        """Set Adam's step count after a load."""
        ...

    def close(self) -> None:
        """Give back memory and groups."""
        ...
