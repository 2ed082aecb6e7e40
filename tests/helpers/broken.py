"""A rank whose arithmetic errs once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.helpers.runs import Run, microbatches, open_engine, pieces


def train_with_an_error(run: Run, rank: int) -> tuple[list[tuple[float, bool]], bool, list[tuple[Any, ...]]]:
    """Train; in the second step a gradient of ``rank`` is no number, and the step is done again.

    Returns:
        Loss and whether it was applied of every try; whether the refused one left this rank's state as it was, bit for
        bit; this rank's pieces at the end.
    """
    engine, groups = open_engine(run)
    if engine is None:
        return [], True, []
    tries: list[tuple[float, bool]] = []
    is_same = True
    for step in range(run.steps):
        batches = microbatches(run, step, groups.coordinate("dp"))
        if step == 1:
            before = pieces(engine)
            planted = plant(engine) if dist.get_rank() == rank else None
            result = engine.train_step(batches, run.rate(step), is_finite)
            tries.append((result.loss, result.applied))
            if planted is not None:
                planted.remove()
            is_same = all(np.array_equal(one[4], two[4]) for one, two in zip(before, pieces(engine), strict=True))
        result = engine.train_step(batches, run.rate(step), is_finite)
        tries.append((result.loss, result.applied))
    state = pieces(engine)
    groups.close()
    return tries, is_same, state


def is_finite(loss: float, grad_norm: float) -> bool:
    """What the loop asks for, without spikes."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


def plant(engine: Any) -> Any:
    """Let the gradient of one trained parameter of this rank be no number; returns the hook's handle."""
    trained = next(each for chunk in engine._chunks for each in chunk.parameters() if each.requires_grad)
    return trained.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
