"""What is asked of experts: refused where there are none, and told of where it makes a run depend on its cut."""

from __future__ import annotations

import pytest

from orchestrator.certify.command import Request, certify
from orchestrator.commands import plan_job
from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError

MIXTURE = ("model=qwen3_30b_a3b", "cluster=h100x8", "tuner.targets=[q_proj,v_proj]")
CAPACITY = "experts.capacity_factor=1.25: tokens are dropped by what shares a rank, so the run depends on how it is cut"
OVER = (
    "experts.balancing_over=micro_batch: the loss is of sequences that share a micro-batch, so the run depends on "
    "micro_sequences and dp"
)


def warned(*words: str) -> list[str]:
    lines = plan_job(compose_job([*MIXTURE, *words])).warning.splitlines()
    return [line for line in lines if not line.startswith("not certified")]


def test_what_depends_on_the_cut_is_told_of() -> None:
    assert warned() == []
    assert warned("experts.capacity_factor=1.25") == [CAPACITY]
    assert warned("experts.capacity_factor=1.25", "experts.balancing_over=micro_batch") == [OVER, CAPACITY]


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("experts.balancing_loss=0.1", "experts.balancing_loss=null"),
        ("experts.balancing_over=micro_batch", "experts.balancing_over=sequence"),
        ("experts.capacity_factor=2", "experts.capacity_factor=null"),
    ],
)
def test_a_dense_model_has_no_experts(typed: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="needs experts, but the model is dense") as caught:
        plan_job(compose_job(["model=smollm2_135m", typed]))
    assert caught.value.hint == hint
    assert plan_job(compose_job(["model=smollm2_135m", hint])).plan


@pytest.mark.parametrize("typed", ["experts.capacity_factor=0", "experts.balancing_over=batch"])
def test_values_that_are_none(typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_job([*MIXTURE, typed])
    assert compose_job([*MIXTURE, caught.value.hint])


@pytest.mark.parametrize("typed", ["experts.capacity_factor=1.25", "experts.balancing_over=micro_batch"])
def test_what_depends_on_the_cut_is_not_certified(typed: str) -> None:
    with pytest.raises(ConfigError, match="no topology need equal one process") as caught:
        certify(Request(compose_job([*MIXTURE, typed])))
    assert caught.value.hint == "experts.balancing_over=sequence experts.capacity_factor=null"
