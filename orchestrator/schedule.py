"""The learning rate of every step, from nothing but the job and the step: so there is no state to restore."""

from __future__ import annotations

import math

from orchestrator.config.job import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of one optimizer step.

    It rises linearly over ``warmup_steps``, then stays (``constant``), falls linearly (``linear``) or along half a
    cosine (``cosine``; Loshchilov and Hutter 2017, arXiv:1608.03983) towards ``min_lr``, which the step after the last
    would have: every step learns, as in transformers.

    Args:
        step: the step about to be taken, counted from 1.
        steps: how many steps the whole run has.
    Example:
        >>> config = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="linear", warmup_steps=2)
        >>> [learning_rate(config, step, 4) for step in (1, 2, 3, 4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = min(1.0, (step - 1 - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    left = 1 - done if optimizer.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left
