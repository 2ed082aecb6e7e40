"""The learning rate of a step depends on the job and the step alone."""

from __future__ import annotations

import pytest

from orchestrator.config.job import OptimizerConfig
from orchestrator.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (3, 10), (5, 5), (9, 4)])
def test_it_rises_to_the_peak_and_never_above_then_falls_to_the_minimum(schedule: str, warmup: int, steps: int) -> None:
    config = OptimizerConfig(lr=0.4, min_lr=0.1, schedule=schedule, warmup_steps=warmup)
    rates = [learning_rate(config, step, steps) for step in range(1, steps + 1)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == pytest.approx([0.4 * (index + 1) / warmup for index in range(len(rising))])
    assert all(0.1 - 1e-12 <= rate <= 0.4 for rate in falling)
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == pytest.approx(0.4)
        after = learning_rate(config, steps + 1, steps)
        assert after == pytest.approx(0.4 if schedule == "constant" else 0.1)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_it_is_that_of_transformers_one_step_later_in_the_warm_up(name: str) -> None:
    """transformers begins its warm-up at 0, a step that learns nothing; after it both are the same."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=12)
    theirs = []
    for _ in range(12):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    config = OptimizerConfig(lr=0.3, schedule=name, warmup_steps=3)
    assert [learning_rate(config, step, 12) for step in range(4, 13)] == pytest.approx(theirs[3:])


def test_half_way_cosine_and_linear_are_half_way() -> None:
    for schedule in ("linear", "cosine"):
        assert learning_rate(OptimizerConfig(lr=1.0, schedule=schedule), 6, 10) == pytest.approx(0.5)


def test_a_step_beyond_the_last_keeps_the_minimum() -> None:
    assert learning_rate(OptimizerConfig(lr=1.0, min_lr=0.2, schedule="linear"), 30, 10) == pytest.approx(0.2)
