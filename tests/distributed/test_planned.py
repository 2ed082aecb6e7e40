"""What a plan chose by itself is what ranks run, and it changes no number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from orchestrator.config.job import BatchConfig, JobConfig, ModelConfig, TopologyConfig, TunerConfig
from orchestrator.planning.memory import GIB
from orchestrator.planning.plan import Plan, make_plan
from parallel.families import read_model
from parallel.specs import ClusterSpec
from tests.helpers import runs
from tests.helpers.pool import Pool

CONFIG = runs.config("llama")
MODEL = read_model(CONFIG)
JOB = JobConfig(
    precision="fp32",
    model=ModelConfig(weights="random", config=CONFIG),
    tuner=TunerConfig(name="full"),
    batch=BatchConfig(global_sequences=8, sequence_tokens=12),
)


def train(job: JobConfig, plan: Plan) -> dict[str, Any]:
    """Three steps of a planned job on this rank, and what its engine was built with."""
    from orchestrator.assemble import open_engine
    from orchestrator.loop import batch_shape
    from parallel.groups import open_groups

    if dist.get_rank() >= plan.ranks_used:
        return {}
    groups = open_groups(plan.topology, dist.get_rank())
    engine: Any = open_engine(job, plan, groups)
    shape = batch_shape(plan, plan.micro_sequences)
    run = runs.Run(topology=plan.topology, global_sequences=8, micro_sequences=shape.micro_sequences)
    losses = []
    for step in range(3):
        batches = runs.microbatches(run, step, groups.coordinate("dp"))
        assert len(batches) == shape.micro_batches
        losses.append(engine.train_step(batches, 1e-3).loss)
    found = {
        "recompute": engine._config.recompute_granularity or "none",
        "distributed": engine._wrapped[0].ddp_config.use_distributed_optimizer,
        "vpp": len(engine._chunks),
        "sp": engine._config.sequence_parallel,
    }
    groups.close()
    return {"losses": losses, **found}


def on_gpus(memory_gib: float, **sizes: int) -> Plan:
    """A plan for two GPUs, whose choices differ from a CPU's, to be run on a CPU."""
    job = replace(JOB, topology=TopologyConfig(**sizes))
    return replace(make_plan(job, MODEL, ClusterSpec("two", 1, 2, "cuda", memory_gib)), device="cpu")


@pytest.fixture(scope="module")
def alone(pool: Pool) -> list[float]:
    """The losses of one process with plain settings."""
    plain = replace(JOB, batch=replace(JOB.batch, micro_sequences=1))
    plan = make_plan(plain, MODEL, ClusterSpec("one", 1, 1))
    assert (plan.micro_sequences, plan.recompute, plan.distributed) == (1, "none", False)
    losses: list[float] = pool.run(1, train, plain, plan)[0]["losses"]
    return losses


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"pp": 2}, {"tp": 2}])
def test_what_was_derived_reaches_the_engine(pool: Pool, alone: list[float], sizes: dict[str, int]) -> None:
    roomy = on_gpus(76.0, **sizes)
    needs = max(stage.total for stage in roomy.memory) / GIB
    tight = on_gpus(needs * (1 - 1e-7), **sizes)  # some activations less
    assert roomy.micro_sequences > 1 and tight != roomy
    for plan in (roomy, tight):
        for found in pool.run(2, train, JOB, plan):
            assert found["losses"] == pytest.approx(alone, rel=1e-5)
            asked = {"recompute": plan.recompute, "distributed": plan.distributed, "vpp": plan.vpp or 1, "sp": plan.sp}
            assert {name: found[name] for name in asked} == asked


def test_recompute_that_was_derived_reaches_the_engine(pool: Pool, alone: list[float]) -> None:
    """One row per micro-batch, and room for its layers' inputs only."""
    job = replace(JOB, batch=replace(JOB.batch, micro_sequences=1))
    two = ClusterSpec("two", 1, 2, memory_gib=4.0)
    kept, again = (
        max(stage.total for stage in make_plan(asked, MODEL, two).memory)
        for asked in (job, replace(job, memory=replace(job.memory, recompute="full")))
    )
    plan = make_plan(job, MODEL, replace(two, memory_gib=(kept + again) / 2 / GIB))
    assert again < kept and plan.recompute == "full"
    for found in pool.run(plan.ranks_used, train, job, plan):
        assert found["recompute"] == "full" and found["losses"] == pytest.approx(alone, rel=1e-5)
