"""Plan promises: what was asked is kept, the batch never changes, what cannot run is refused with a hint that works."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.job import (
    BatchConfig,
    JobConfig,
    MemoryConfig,
    OptimizerConfig,
    TopologyConfig,
    TunerConfig,
)
from orchestrator.errors import ConfigError, DataError
from orchestrator.planning.memory import GIB
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.show import batch_arithmetic
from parallel.specs import ClusterSpec, ModelSpec
from parallel.topology import Topology

SMOLLM2 = ModelSpec("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, True)
LLAMA3_8B = ModelSpec("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, 5e5, False)
MOE = replace(
    SMOLLM2, family="qwen3_moe", layers=4, experts=8, experts_per_token=2, expert_ffn=64, router_aux_loss=0.01
)
EXPERTS = ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]
ONE_LAYER = replace(SMOLLM2, layers=1, kv_heads=1)
SPENDTHRIFT = JobConfig(memory=MemoryConfig("none"), optimizer=OptimizerConfig(distributed=False))
BIG_MICRO_BATCHES = replace(
    SPENDTHRIFT, batch=BatchConfig(global_sequences=64, micro_sequences=16), topology=TopologyConfig(sp=False)
)
LAPTOP = ClusterSpec("laptop", 1, 4)
H100X8 = ClusterSpec("h100x8", 1, 8, "cuda", 76.0)
H100X16 = ClusterSpec("h100x16", 2, 8, "cuda", 76.0)


def asking(**sizes: Any) -> JobConfig:
    return JobConfig(topology=TopologyConfig(**sizes))


def typed(job: JobConfig, cluster: ClusterSpec, hint: str) -> tuple[JobConfig, ClusterSpec]:
    """The job and the cluster after typing a hint as overrides."""
    for assignment in hint.split():
        key, value = assignment.split("=")
        words: dict[str, Any] = {"null": None, "true": True, "false": False}
        parsed = words[value] if value in words else int(value) if value.lstrip("-").isdigit() else value
        group, _, name = key.rpartition(".")
        if group == "cluster":
            cluster = replace(cluster, **{name: parsed})
        elif group:
            job = replace(job, **{group: replace(getattr(job, group), **{name: parsed})})
        elif key in ("tuner", "engine"):
            job = replace(job, **{key: replace(getattr(job, key), name=parsed)})
        else:
            job = replace(job, **{key: parsed})
    return job, cluster


@pytest.mark.parametrize(
    ("sizes", "cluster", "topology"),
    [
        ({}, LAPTOP, Topology(dp=4)),
        ({"pp": 2}, LAPTOP, Topology(pp=2, dp=2)),
        ({"tp": 3}, LAPTOP, Topology(tp=3)),
        ({"tp": 3, "pp": 1, "dp": 1}, LAPTOP, Topology(tp=3)),
        ({"dp": 2, "tp": 1, "pp": 1}, LAPTOP, Topology(dp=2)),
        ({"sp": True}, LAPTOP, Topology(tp=3)),
        ({"tp": 3}, H100X8, Topology(tp=3, pp=2)),
        ({"vpp": 1, "cp": 1, "ep": 1, "etp": 1}, LAPTOP, Topology(dp=4)),
    ],
)
def test_what_is_asked_is_kept_and_the_rest_is_derived(
    sizes: dict[str, Any], cluster: ClusterSpec, topology: Topology
) -> None:
    plan = make_plan(asking(**sizes), SMOLLM2, cluster)
    for axis, size in sizes.items():
        if axis in ("tp", "pp", "dp"):
            assert getattr(plan.topology, axis) == size
    if cluster is LAPTOP:
        assert plan.topology == topology
    assert plan.ranks_used == plan.topology.world_size
    assert plan.ranks_used + plan.ranks_idle == cluster.ranks
    assert plan.vpp is None
    assert len(plan.memory) == len(plan.stages) == plan.topology.pp


@given(
    tp=st.sampled_from([None, 1, 2, 3, 5]),
    pp=st.sampled_from([None, 1, 2, 7]),
    dp=st.sampled_from([None, 1, 2, 3, 8, 16]),
    sp=st.sampled_from([None, True, False]),
    vpp=st.sampled_from([None, 1, 2]),
    cp=st.sampled_from([None, 1, 2, 3]),
    cp_comm=st.sampled_from([None, "ring", "ulysses"]),
    shape=st.sampled_from([(1, 1), (1, 4), (1, 8), (2, 4), (2, 3)]),
    rows=st.sampled_from([1, 6, 8, 12, 64]),
    micro=st.sampled_from([None, 1, 2, 4]),
)
@settings(max_examples=300)
def test_a_job_has_a_plan_or_an_error_whose_hints_lead_to_one(
    tp: int | None,
    pp: int | None,
    dp: int | None,
    sp: bool | None,
    vpp: int | None,
    cp: int | None,
    cp_comm: str | None,
    shape: tuple[int, int],
    rows: int,
    micro: int | None,
) -> None:
    """And the plan keeps every asked size and the global batch, uses all ranks of several nodes, and fits."""
    job = JobConfig(
        topology=TopologyConfig(tp=tp, pp=pp, dp=dp, sp=sp, vpp=vpp, cp=cp, cp_comm=cp_comm),
        batch=BatchConfig(global_sequences=rows, micro_sequences=micro),
    )
    cluster = ClusterSpec("any", *shape, memory_gib=8.0)
    plan: Plan | None = None
    hints: list[str] = []
    for _ in range(3):
        try:
            plan = make_plan(job, SMOLLM2, cluster)
            break
        except ConfigError as error:
            hints.append(error.render())
            first, *others = error.hint.split("  or  ")
            for other in others:
                changed, room = typed(job, cluster, other)
                make_plan(changed, SMOLLM2, room)
            job, cluster = typed(job, cluster, first)
    assert plan is not None, hints
    assert len(hints) <= 1 + (rows % (micro or 1) != 0), hints
    for axis in ("tp", "pp", "dp", "cp"):
        assert getattr(job.topology, axis) in (None, getattr(plan.topology, axis))
    assert job.topology.sp in (None, plan.sp)
    assert job.topology.cp_comm in (None, plan.cp_comm)
    assert micro in (None, plan.micro_sequences) or hints
    micro_batches = plan.topology.dp * plan.micro_batches - plan.empty_micro_batches
    assert plan.global_sequences == rows == micro_batches * plan.micro_sequences
    assert 0 <= plan.empty_micro_batches < plan.topology.dp
    assert plan.ranks_idle == 0 or cluster.nodes == 1
    assert max(stage.total for stage in plan.memory) <= cluster.memory_gib * GIB
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("job", "model", "cluster", "message", "hint"),
    [
        (
            asking(tp=2),
            SMOLLM2,
            LAPTOP,
            "model has 9 attention heads and 3 key/value heads, which topology.tp=2 does not divide",
            "topology.tp=3",
        ),
        (
            asking(tp=2, dp=8),
            LLAMA3_8B,
            H100X8,
            "topology needs 16 ranks (pp=1 dp=8 cp=1 tp=2) but cluster has 8",
            "topology.dp=4",
        ),
        (
            replace(asking(dp=3), batch=BatchConfig(global_sequences=2)),
            SMOLLM2,
            LAPTOP,
            "batch.global_sequences=2 in micro-batches of 1 gives topology.dp=3 ranks only 2",
            "topology.dp=2",
        ),
        (
            asking(tp=2, pp=1, dp=4),
            LLAMA3_8B,
            H100X16,
            "topology uses 8 of 16 ranks (pp=1 dp=4 cp=1 tp=2), but on cluster.nodes=2 all must be used",
            "topology.dp=8",
        ),
        (
            asking(cp=2, cp_comm="ulysses"),
            SMOLLM2,
            LAPTOP,
            "topology.cp_comm=ulysses deals out attention heads, but topology.cp=2 does not divide the 9 of a rank "
            "(9 heads / topology.tp=1)",
            "topology.cp_comm=ring",
        ),
        (
            asking(cp=3),
            SMOLLM2,
            ClusterSpec("two", 1, 2),
            "topology needs 3 ranks (pp=1 dp=1 cp=3 tp=1) but cluster has 2",
            "topology.cp=1",
        ),
        (
            asking(ep=3),
            SMOLLM2,
            LAPTOP,
            "topology.ep=3 x topology.etp=1 = 3 does not divide the 4 ranks of a pipeline stage (dp=4 cp=1 tp=1)",
            "topology.ep=1",
        ),
        (
            asking(sp=True, tp=1),
            SMOLLM2,
            LAPTOP,
            "topology.sp=true needs topology.tp larger than 1, but topology.tp=1",
            "topology.sp=false",
        ),
        (
            JobConfig(batch=BatchConfig(global_sequences=8, micro_sequences=3)),
            SMOLLM2,
            LAPTOP,
            "batch.global_sequences=8 is no multiple of batch.micro_sequences=3",
            "batch.micro_sequences=4",
        ),
        (
            JobConfig(precision="fp8"),
            SMOLLM2,
            LAPTOP,
            "precision=fp8 is not built; there is fp32, bf16",
            "precision=fp32",
        ),
        (
            JobConfig(memory=MemoryConfig(recompute="some")),
            SMOLLM2,
            LAPTOP,
            "memory.recompute=some is not built; there is none, selective, full",
            "memory.recompute=none",
        ),
        (asking(tp=0), SMOLLM2, LAPTOP, "topology.tp=0 is no positive whole number", "topology.tp=1"),
        (
            JobConfig(batch=BatchConfig(global_sequences=-8)),
            SMOLLM2,
            LAPTOP,
            "batch.global_sequences=-8 is no positive whole number",
            "batch.global_sequences=1",
        ),
        (
            JobConfig(),
            SMOLLM2,
            replace(LAPTOP, device="tpu"),
            "cluster.device=tpu is unknown; there is cpu, cuda",
            "cluster.device=cpu",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    job: JobConfig, model: ModelSpec, cluster: ClusterSpec, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(job, model, cluster)
    assert str(caught.value) == message
    assert caught.value.hint.split("  or  ")[0] == hint
    make_plan(*(lambda changed: (changed[0], model, changed[1]))(typed(job, cluster, hint)))


def test_targets_that_match_nothing_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"tuner.targets: 'q_prj' matches no linear layer") as caught:
        make_plan(JobConfig(tuner=TunerConfig(targets=["q_prj"])), SMOLLM2, LAPTOP)
    assert "q_proj" in caught.value.hint


@pytest.mark.parametrize(
    ("job", "model", "memory_gib", "hint"),
    [
        (BIG_MICRO_BATCHES, SMOLLM2, 4.0, "batch.micro_sequences=1"),
        (replace(SPENDTHRIFT, tuner=TunerConfig(name="full")), ONE_LAYER, 1.2, "optimizer.distributed=true"),
        (replace(SPENDTHRIFT, batch=BatchConfig(sequence_tokens=1024)), SMOLLM2, 1.3, "memory.recompute=full"),
        (replace(asking(pp=1, tp=1), memory=MemoryConfig("none")), SMOLLM2, 1.5, "topology.pp=3"),
        (JobConfig(), SMOLLM2, 0.1, "cluster.memory_gib=1"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers_and_a_saving_that_fits(
    job: JobConfig, model: ModelSpec, memory_gib: float, hint: str
) -> None:
    cluster = replace(LAPTOP, memory_gib=memory_gib)
    with pytest.raises(
        ConfigError, match=r"no topology fits the memory; the smallest is .* needs .* GiB per rank"
    ) as caught:
        make_plan(job, model, cluster)
    assert f"cluster.memory_gib={memory_gib:g}" in str(caught.value)
    changed, cluster = typed(job, cluster, caught.value.hint)
    make_plan(changed, model, cluster)
    assert caught.value.hint == hint


@pytest.mark.parametrize("cluster", [ClusterSpec("one", 1, 1), LAPTOP, H100X8, H100X16])
def test_a_change_of_cluster_never_changes_the_global_batch(cluster: ClusterSpec) -> None:
    plan = make_plan(JobConfig(batch=BatchConfig(global_sequences=48)), LLAMA3_8B, replace(cluster, memory_gib=76.0))
    assert plan.global_sequences == 48 == plan.topology.dp * plan.micro_batches * plan.micro_sequences


def test_precision_follows_the_device_unless_asked() -> None:
    assert make_plan(JobConfig(), SMOLLM2, LAPTOP).precision == "fp32"
    assert make_plan(JobConfig(), SMOLLM2, H100X8).precision == "bf16"
    assert make_plan(JobConfig(precision="bf16"), SMOLLM2, LAPTOP).precision == "bf16"


def test_rows_are_padded_for_sequence_parallelism_only() -> None:
    assert make_plan(asking(tp=3, sp=True), SMOLLM2, LAPTOP).length_multiple == 3
    assert make_plan(asking(tp=3), SMOLLM2, LAPTOP).length_multiple == 1


def test_idle_ranks_and_rejected_topologies_are_said() -> None:
    plan = make_plan(asking(tp=3), SMOLLM2, LAPTOP)
    assert "1 of 4 ranks stay idle" in plan.reasons
    rejected = {one.topology: one.reason for one in make_plan(JobConfig(), SMOLLM2, LAPTOP).rejected}
    assert "9 attention heads" in rejected["pp=1 dp=2 cp=1 tp=2"]
    assert rejected["pp=2 dp=2 cp=1 tp=1"].startswith("slower: ")


def test_uneven_stages_are_explained() -> None:
    plan = make_plan(asking(pp=4), SMOLLM2, LAPTOP)
    assert [layer for chunk in plan.stages for layer in chunk] == list(range(30))
    assert "30 layers as 9 + 9 + 10 + 2: the output head counts as work of the last stage" in plan.reasons


@pytest.mark.parametrize(
    "damage", [lambda text: text[:200], lambda text: text.replace('"vpp"', '"xpp"'), lambda _: "[]"]
)
def test_a_damaged_plan_is_a_data_error(damage: Any) -> None:
    text = make_plan(JobConfig(), SMOLLM2, LAPTOP).to_json()
    with pytest.raises(DataError, match=r"plan.json is no plan: ") as caught:
        Plan.from_json(damage(text))
    assert "isotrain plan" in caught.value.hint


def test_a_plan_is_pure_and_repeatable() -> None:
    job = asking(pp=2)
    before = asdict(job)
    assert make_plan(job, SMOLLM2, LAPTOP) == make_plan(job, SMOLLM2, LAPTOP)
    assert asdict(job) == before


def test_rows_that_fit_no_rank_are_hinted_to_be_cut() -> None:
    """Long rows on two ranks, everything else saved already: only topology.cp helps."""
    job = JobConfig(
        batch=BatchConfig(sequence_tokens=32768, global_sequences=2),
        memory=MemoryConfig(recompute="full"),
        optimizer=OptimizerConfig(distributed=True),
        topology=TopologyConfig(cp=1),
    )
    long = replace(SMOLLM2, max_positions=65536)
    two = ClusterSpec("two", 1, 2, memory_gib=4)
    with pytest.raises(ConfigError, match="no topology fits the memory") as caught:
        make_plan(job, long, two)
    assert caught.value.hint == "topology.cp=2"
    job, _ = typed(job, two, caught.value.hint)
    plan = make_plan(job, long, two)
    assert (plan.topology, plan.cp_comm) == (Topology(cp=2), "ring")
    assert make_plan(replace(job, topology=TopologyConfig()), long, two).topology == plan.topology


def test_the_plan_says_how_rows_are_cut() -> None:
    plan = make_plan(asking(cp=2), SMOLLM2, LAPTOP)
    assert "cp=2 by ring: each rank holds 2 of a row's 4 chunks, an early and a late one" in plan.reasons
    assert plan.length_multiple == 4 and plan.topology == Topology(cp=2, dp=2)
    assert make_plan(asking(cp=3, cp_comm="ulysses"), SMOLLM2, LAPTOP).cp_comm == "ulysses"


def test_a_plan_of_before_there_was_a_choice_is_read_as_a_ring() -> None:
    old = json.loads(make_plan(asking(dp=2), SMOLLM2, LAPTOP).to_json())
    del old["cp_comm"], old["step_time"]["context_s"]
    assert Plan.from_json(json.dumps(old)).cp_comm == "ring"


@pytest.mark.parametrize(
    ("sizes", "topology"),
    [
        ({"ep": 4}, Topology(dp=4, ep=4)),
        ({"ep": 2, "etp": 2}, Topology(dp=4, ep=2, etp=2)),
        ({"ep": 2, "pp": 2}, Topology(pp=2, dp=2, ep=2)),
        ({"ep": 3, "tp": 3}, "model has 8 experts, which topology.ep=3 does not divide"),
        ({"ep": 8}, "topology.ep=8 x topology.etp=1 = 8 does not divide the 4 ranks"),
    ],
)
@pytest.mark.parametrize("name", ["lora", "full"])
def test_experts_are_planned_as_asked(sizes: dict[str, int], topology: Topology | str, name: str) -> None:
    job = replace(asking(**sizes), tuner=TunerConfig(name=name, targets=EXPERTS))
    if isinstance(topology, Topology):
        assert make_plan(job, MOE, LAPTOP).topology == topology
        return
    with pytest.raises(ConfigError) as caught:
        make_plan(job, MOE, LAPTOP)
    assert topology in str(caught.value)
    make_plan(*(typed(job, LAPTOP, caught.value.hint)[0], MOE, LAPTOP))


def test_dp_need_not_divide_the_batch() -> None:
    """Eight rows on three ranks: three micro-batches of one row each, of which one has none; two ranks have four."""
    cluster = replace(LAPTOP, gpus_per_node=3)
    plan = make_plan(asking(tp=1, pp=1), SMOLLM2, cluster)
    assert (plan.topology.dp, plan.micro_batches, plan.micro_sequences, plan.empty_micro_batches) == (3, 3, 1, 1)
    assert batch_arithmetic(plan) == "8 sequences = 3 dp x 3 micro-batches x 1, 1 of them empty"
    assert any("1 of 9 micro-batches are without rows" in reason for reason in plan.reasons)
    slower = make_plan(asking(tp=1, pp=1, dp=2), SMOLLM2, cluster)
    assert slower.step_time.total_s > plan.step_time.total_s
    even = make_plan(asking(tp=1, pp=1), SMOLLM2, replace(cluster, gpus_per_node=7))
    assert (even.topology.dp, even.empty_micro_batches) == (4, 0)  # seven ranks have no less to do than four
