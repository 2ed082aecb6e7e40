"""What a plan says beside itself: its limit, the next best, fewer ranks, one change; why, and comparisons; any ask."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench import planning
from orchestrator.cli import main
from orchestrator.config.job import (
    BatchConfig,
    JobConfig,
    MemoryConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TopologyConfig,
    TunerConfig,
)
from orchestrator.errors import ConfigError, DataError
from orchestrator.planning.advice import Advice, advise, limit_of, operations_per_token, why
from orchestrator.planning.candidates import Question
from orchestrator.planning.compare import compared, comparison, read_plan
from orchestrator.planning.devices import catalogue
from orchestrator.planning.plan import Plan, decide, make_plan
from orchestrator.planning.search import ALIKE, Found, search
from orchestrator.planning.shape import shape_of
from orchestrator.planning.show import advice_lines
from orchestrator.planning.timing import StepTime
from parallel.specs import ClusterSpec, ModelSpec

LLAMA3_8B = ModelSpec("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, 5e5, False)
H100X64 = ClusterSpec("h100x64", 8, 8, "cuda", 76.0, "H100-80GB")
FULL = JobConfig(tuner=TunerConfig(name="full"), batch=BatchConfig(global_sequences=128, sequence_tokens=8192))
WHOLE = replace(FULL, optimizer=OptimizerConfig(distributed=False))


@pytest.fixture(scope="module")
def planned() -> tuple[Plan, Advice]:
    plan = make_plan(FULL, LLAMA3_8B, H100X64)
    return plan, advise(FULL, LLAMA3_8B, H100X64, plan)


def test_speed_and_utilisation_are_of_the_estimated_step(planned: tuple[Plan, Advice]) -> None:
    plan, advice = planned
    tokens = 128 * 8192
    assert advice.tokens_per_s_per_rank == pytest.approx(tokens / plan.step_time.total_s / 64)
    per_token = operations_per_token(shape_of(LLAMA3_8B), 8192, frozen=False)
    assert advice.utilisation == pytest.approx(per_token * advice.tokens_per_s_per_rank / 989e12)
    assert 0.2 < advice.utilisation < 0.7 and advice.error == 0.13
    other = replace(H100X64, gpu="H200")
    assert advise(FULL, LLAMA3_8B, other, make_plan(FULL, LLAMA3_8B, other)).error == 0.25


def test_frozen_weights_need_two_thirds_of_the_products() -> None:
    short = shape_of(replace(LLAMA3_8B, vocab=1))
    full, frozen = (operations_per_token(short, 1, frozen=frozen) for frozen in (False, True))
    assert frozen / full == pytest.approx(2 / 3, rel=1e-3)


def test_the_next_best_and_fewer_ranks_work_when_typed(planned: tuple[Plan, Advice]) -> None:
    plan, advice = planned
    assert advice.next_best and ALIKE["cuda"] * advice.next_best.step_time.total_s >= plan.step_time.total_s
    assert advice.layouts == plan.considered > 1 + len(plan.rejected)
    sizes = {
        key.split(".")[1]: int(value) for key, value in (word.split("=") for word in advice.next_best.typed.split())
    }
    again = make_plan(replace(FULL, topology=TopologyConfig(**sizes)), LLAMA3_8B, H100X64)
    assert str(again.topology) == advice.next_best.topology
    assert again.step_time.total_s == pytest.approx(advice.next_best.step_time.total_s)
    assert advice.fewest and advice.fewest.ranks < 64
    sizes = {key.split(".")[1]: int(value) for key, value in (word.split("=") for word in advice.fewest.typed.split())}
    assert make_plan(FULL, LLAMA3_8B, replace(H100X64, **sizes)).ranks_used == advice.fewest.ranks


def test_one_change_is_faster_and_changes_no_number_of_the_run() -> None:
    plan = make_plan(WHOLE, LLAMA3_8B, H100X64)
    faster = advise(WHOLE, LLAMA3_8B, H100X64, plan).faster
    assert faster and faster.typed == "optimizer.distributed=null"
    again = make_plan(FULL, LLAMA3_8B, H100X64)
    assert again.step_time.total_s == pytest.approx(faster.step_time.total_s)
    assert again.step_time.total_s < plan.step_time.total_s
    assert advise(FULL, LLAMA3_8B, H100X64, again).faster is None  # nothing is fixed
    recomputing = replace(FULL, memory=MemoryConfig(recompute="full"))
    slow = make_plan(recomputing, LLAMA3_8B, H100X64)
    faster = advise(recomputing, LLAMA3_8B, H100X64, slow).faster
    assert faster and faster.typed == "memory.recompute=null"


def test_what_a_plan_has_weighed_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, weighed = decide(FULL, LLAMA3_8B, H100X64)
    alone, searched = advise(FULL, LLAMA3_8B, H100X64, plan), []

    def counted(question: Question) -> Found:
        searched.append(question.cluster)
        return search(question)

    monkeypatch.setattr("orchestrator.planning.advice.search", counted)
    assert advise(FULL, LLAMA3_8B, H100X64, plan, weighed) == alone
    assert searched and all(cluster != H100X64 for cluster in searched)  # smaller clusters, for the fewest ranks


def test_of_topologies_that_are_alike_the_one_with_fewest_stages_is_taken(planned: tuple[Plan, Advice]) -> None:
    plan, advice = planned
    assert advice.next_best and advice.next_best.step_time.total_s < plan.step_time.total_s
    assert plan.topology.pp == 1 and "pp=2" in advice.next_best.topology
    assert any("of those within 4% of the fastest the one with the fewest stages" in one for one in plan.reasons)


def test_the_limit_is_where_most_of_the_step_goes() -> None:
    assert limit_of(StepTime(bubble_s=3.0, matmul_s=1.0)).startswith("the pipeline bubble (75 %")
    assert limit_of(StepTime(data_s=2.0, expert_s=2.0, matmul_s=3.0)).startswith("links between ranks (57 %")


def test_a_choice_is_explained_by_cause_and_memory(planned: tuple[Plan, Advice]) -> None:
    plan, _ = planned
    lines = why(FULL, LLAMA3_8B, H100X64, plan, replace(FULL, topology=TopologyConfig(tp=8)))
    assert lines[0].startswith("at best pp=1 dp=8 cp=1 tp=8: an estimated ") and "times the plan's" in lines[0]
    assert any(line.strip().startswith("tensor ") for line in lines)
    assert lines[-1].startswith("fullest rank ")
    none = why(FULL, LLAMA3_8B, H100X64, plan, replace(FULL, topology=TopologyConfig(tp=3)))
    assert any("topology.tp=3" in line for line in none) and all(line.startswith("cannot run: ") for line in none)
    same = why(FULL, LLAMA3_8B, H100X64, plan, replace(FULL, topology=TopologyConfig(tp=plan.topology.tp)))
    assert same == [f"it is what the plan has: {plan.topology}"]


def test_the_terminal_names_limit_fewest_and_next_best(planned: tuple[Plan, Advice]) -> None:
    text = "\n".join(advice_lines(planned[1]))
    for word in (
        "speed ",
        "of the device's peak (MFU), give or take 13%",
        "limit ",
        "fewest ",
        "next best ",
    ):
        assert word in text
    assert f"layouts   {planned[1].layouts} considered" in text


def test_two_plans_are_compared(tmp_path: Path, planned: tuple[Plan, Advice], capsys: pytest.CaptureFixture) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(planned[0].to_json())
    other = make_plan(replace(FULL, topology=TopologyConfig(tp=8)), LLAMA3_8B, H100X64)
    two.write_text(other.to_json())
    assert main(["plan", "--compare", str(one), str(two)]) == 0
    text = capsys.readouterr().out
    assert "topology: " in text and "-> pp=1 dp=8 cp=1 tp=8" in text and "fullest rank: " in text
    assert main(["plan", "--compare", str(one), str(two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_s"] == [planned[0].step_time.total_s, other.step_time.total_s]
    assert compared(planned[0], planned[0])[0] == "the same layout"
    longer = replace(planned[0], sequence_tokens=1)
    assert not comparison(planned[0], longer)["same_run"] and "two different runs" in compared(planned[0], longer)[-1]
    with pytest.raises(DataError, match=r"none\.json cannot be read: "):
        read_plan(tmp_path / "none.json")


def test_why_on_the_command_line(capsys: pytest.CaptureFixture) -> None:
    arguments = ["plan", "model=llama3_8b", "cluster=h100x8", "--why", "topology.tp=4"]
    assert main(arguments) == 0
    assert "at best" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"] == ["topology.tp=4"]


def test_sixteen_thousand_ranks_are_all_used() -> None:
    planned = planning.measure(rounds=1)
    assert planned.ranks == 16384 and planned.layouts > 1000 and planned.cpu_s > 0
    assert planned.topology in planning.table(planned)


CLUSTERS = st.builds(
    ClusterSpec,
    name=st.just("any"),
    nodes=st.integers(1, 40),
    gpus_per_node=st.integers(1, 16),
    device=st.just("cuda"),
    memory_gib=st.sampled_from([1.0, 8.0, 22.0, 76.0, 180.0]),
    gpu=st.sampled_from([None, *(kind for kind in catalogue() if kind != "cpu")]),
)
MODELS = st.builds(
    lambda heads, groups, dim, layers, ffn, experts: ModelSpec(
        "qwen3_moe" if experts else "llama",
        layers,
        heads * dim,
        heads * groups,
        heads,
        dim,
        ffn,
        32000,
        65536,
        1e-5,
        1e4,
        False,
        experts=experts,
        experts_per_token=min(2, experts),
        expert_ffn=ffn // 2 if experts else 0,
    ),
    heads=st.integers(1, 12),
    groups=st.integers(1, 4),
    dim=st.sampled_from([16, 64, 108, 128]),
    layers=st.integers(1, 90),
    ffn=st.sampled_from([64, 1000, 4096, 28672]),
    experts=st.sampled_from([0, 0, 2, 8, 64]),
)
SIZES = st.sampled_from([None, None, None, 1, 2, 3, 4, 8])
JOBS = st.builds(
    lambda topology, rows, micro, tokens, full, distributed, recompute, objective: JobConfig(
        topology=topology,
        batch=BatchConfig(rows, micro, tokens),
        tuner=TunerConfig(name="full") if full else TunerConfig(targets=["q_proj", "v_proj"]),
        optimizer=OptimizerConfig(distributed=distributed),
        memory=MemoryConfig(recompute),
        objective=ObjectiveConfig(objective),
    ),
    topology=st.builds(
        TopologyConfig, tp=SIZES, pp=SIZES, cp=SIZES, ep=SIZES, dp=SIZES, vpp=st.sampled_from([None, 2])
    ),
    rows=st.integers(1, 512),
    micro=st.sampled_from([None, 1, 2, 5]),
    tokens=st.sampled_from([1, 100, 4096, 65536, 70000]),
    full=st.booleans(),
    distributed=st.sampled_from([None, False, True]),
    recompute=st.sampled_from([None, "none", "selective", "full"]),
    objective=st.sampled_from(["sft", "sft", "dpo", "orpo", "simpo"]),
)


def ask_anything(cluster: ClusterSpec, model: ModelSpec, job: JobConfig) -> None:
    """A plan with advice, or an error with a hint that is a setting."""
    try:
        plan = make_plan(job, model, cluster)
    except ConfigError as error:
        assert str(error) and "=" in error.hint
    else:
        assert plan.step_time.total_s > 0
        assert max(stage.total for stage in plan.memory) <= cluster.memory_gib * 2**30
        assert advise(job, model, cluster, plan).layouts >= 1


@given(CLUSTERS, MODELS, JOBS)
@settings(max_examples=30)
def test_any_ask_has_a_plan_or_an_error_with_a_hint(cluster: ClusterSpec, model: ModelSpec, job: JobConfig) -> None:
    ask_anything(cluster, model, job)


@pytest.mark.grid
@pytest.mark.timeout(1800)
@given(CLUSTERS, MODELS, JOBS)
@settings(max_examples=2000)
def test_two_thousand_asks_have_a_plan_or_an_error_with_a_hint(
    cluster: ClusterSpec, model: ModelSpec, job: JobConfig
) -> None:
    ask_anything(cluster, model, job)
