"""The search's promises: what a job leaves open is derived, what it fixes is kept, and nothing is on for no gain."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from orchestrator.bench.planning import LARGE_CLUSTER, LARGE_JOB, LARGE_MOE
from orchestrator.config.job import BatchConfig, JobConfig, MemoryConfig, OptimizerConfig, TopologyConfig, TunerConfig
from orchestrator.planning.plan import make_plan
from orchestrator.planning.show import MOST_REASONS, group_rejected, render
from tests.orchestrator.test_plan import H100X8, H100X16, LAPTOP, LLAMA3_8B, MOE, SMOLLM2


def test_what_no_axis_says_is_derived_and_what_is_asked_of_it_is_kept() -> None:
    """The least recompute that fits, micro-batches and sharding: open, and each fixed to another value."""
    job = JobConfig(tuner=TunerConfig(name="full"), batch=BatchConfig(64, sequence_tokens=8192))
    roomy = make_plan(job, LLAMA3_8B, H100X16)
    assert roomy.distributed and roomy.recompute == "none"
    tight = make_plan(job, LLAMA3_8B, replace(H100X16, memory_gib=20.0))
    assert tight.recompute == "full" and tight.step_time.total_s > roomy.step_time.total_s
    short = make_plan(replace(job, batch=BatchConfig(64, sequence_tokens=256)), LLAMA3_8B, H100X16)
    assert short.micro_sequences > 1
    fixed = replace(
        job, memory=MemoryConfig("full"), optimizer=OptimizerConfig(distributed=True), batch=BatchConfig(64, 2, 4096)
    )
    plan = make_plan(fixed, LLAMA3_8B, H100X16)
    assert (plan.recompute, plan.distributed, plan.micro_sequences) == ("full", True, 2)


def test_experts_and_long_rows_are_spread_where_that_is_left_open() -> None:
    job = JobConfig(tuner=TunerConfig(name="full"), batch=BatchConfig(64, sequence_tokens=4096))
    large = replace(MOE, layers=32, hidden=2048, heads=16, kv_heads=4, head_dim=128, expert_ffn=1024, experts=64)
    plan = make_plan(job, large, H100X16)
    assert plan.topology.ep > 1 and plan.considered > len(plan.rejected)
    one = make_plan(replace(job, topology=TopologyConfig(ep=1)), large, replace(H100X16, memory_gib=2000.0))
    assert one.topology.ep == 1 and one.step_time.total_s >= plan.step_time.total_s


def test_a_setting_that_gains_nothing_stays_off() -> None:
    """On a CPU, and of an adapter's few parameters on a GPU."""
    plan = make_plan(JobConfig(), SMOLLM2, LAPTOP)
    assert (plan.micro_sequences, plan.recompute, plan.distributed, plan.sp, plan.vpp) == (
        1,
        "none",
        False,
        False,
        None,
    )
    assert not make_plan(JobConfig(), LLAMA3_8B, H100X8).distributed


def test_thousands_of_rejected_topologies_are_a_few_lines() -> None:
    plan = make_plan(LARGE_JOB, LARGE_MOE, LARGE_CLUSTER)
    assert len(plan.rejected) > 1000 and sum(len(names) for _, names in group_rejected(plan)) == len(plan.rejected)
    console = Console(width=300)
    with console.capture() as captured:
        console.print(render(plan, LARGE_JOB, LARGE_MOE))
    told = captured.get().split("rejected")[1].strip().splitlines()
    assert len(told) <= MOST_REASONS + 1
    assert "more memory than there is, at its thriftiest" in captured.get() and "more: slower" in captured.get()


def test_tensor_parallelism_stays_on_fast_links_unless_asked() -> None:
    job = JobConfig(tuner=TunerConfig(name="full"), batch=BatchConfig(2, sequence_tokens=512))
    wide = replace(LLAMA3_8B, heads=32, kv_heads=32)
    named = " ".join(one.topology for one in make_plan(job, wide, H100X16).rejected)
    assert "tp=8" in named and "tp=16" not in named
    asked = make_plan(replace(job, topology=TopologyConfig(tp=16)), wide, H100X16)
    assert asked.topology.tp == 16
