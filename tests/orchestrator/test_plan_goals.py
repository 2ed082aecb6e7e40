"""Preference objectives in plans: a row is a pair, a reference is counted by hand, and train refuses them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.config.job import BatchConfig, JobConfig, ObjectiveConfig, TunerConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.advice import advise
from orchestrator.planning.counts import TunerExtras, Workload
from orchestrator.planning.devices import device
from orchestrator.planning.estimate import setup_of
from orchestrator.planning.goals import GOALS, check_trainable
from orchestrator.planning.memory import StageMemory, stage_memory
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.setup import Setup
from orchestrator.planning.show import plan_facts
from orchestrator.planning.timing import step_time
from parallel import names
from parallel.capabilities import BUILT, Proposal
from parallel.names import resolve_targets
from parallel.specs import ClusterSpec, ModelSpec
from parallel.stages import split_layers
from parallel.topology import Topology

TINY = ModelSpec("llama", 4, 8, 2, 1, 4, 16, 128, 64, 1e-5, 1e4, False)
ROWS, MICRO, TOKENS = 8, 2, 10
LAYOUTS = [Topology(), Topology(pp=2), Topology(dp=2), Topology(cp=2), Topology(tp=2, pp=2)]
LLAMA3_8B = ModelSpec("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, 5e5, False)
H100X8 = ClusterSpec("h100x8", 1, 8, "cuda", 76.0, "H100-80GB")


def work_of(objective: str, topology: Topology, tuner: str = "lora", pairs: int = 1, chosen: str = "") -> Workload:
    """``pairs``: by how much rows and micro-batches are larger."""
    model = replace(TINY, heads=4, kv_heads=2, head_dim=2) if topology.tp > 1 else TINY
    return Workload(
        model=model,
        proposal=Proposal(
            topology, global_sequences=ROWS * pairs, micro_sequences=MICRO * pairs, tuner=tuner, precision="fp32"
        ),
        stages=split_layers(model.layers, topology.pp),
        row_tokens=TOKENS,
        adapted=resolve_targets("all-linear", model) if tuner == "lora" else frozenset(),
        adapter_rank=2,
        device="cpu",
        extras=TunerExtras(chosen=frozenset([chosen] if chosen else [])),
        goal=GOALS[objective],
    )


def setup(work: Workload) -> Setup:
    return setup_of(work, ClusterSpec("here", 1, work.proposal.topology.world_size))


def memory(work: Workload) -> tuple[StageMemory, ...]:
    return stage_memory(setup(work))


@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_pair_without_reference_is_two_sequences(topology: Topology, tuner: str) -> None:
    pair, twice = work_of("orpo", topology, tuner), work_of("sft", topology, tuner, pairs=2)
    assert memory(pair) == memory(twice)
    assert step_time(setup(pair)) == step_time(setup(twice))
    assert pair.micro_tokens == twice.micro_tokens == 2 * MICRO * TOKENS


@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
def test_a_frozen_base_is_its_own_reference(topology: Topology) -> None:
    """Beside ORPO's bytes only fp32 log-probabilities: of a micro-batch's tokens, and of the step's sequences."""
    with_reference, without = memory(work_of("dpo", topology)), memory(work_of("orpo", topology))
    tokens, sequences = 2 * MICRO * TOKENS // topology.cp, 2 * ROWS // topology.dp
    for stage, (one, other) in enumerate(zip(with_reference, without, strict=True)):
        assert one.reference == (4 * (tokens + sequences) if stage == topology.pp - 1 else 0)
        assert replace(one, reference=0) == other


@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
def test_full_tuning_holds_the_weights_twice(topology: Topology) -> None:
    for one in memory(work_of("dpo", topology, "full"))[:-1]:
        assert one.reference == one.weights
    last = memory(work_of("dpo", topology, "full"))[-1]
    told = 4 * (2 * MICRO * TOKENS // topology.cp + 2 * ROWS // topology.dp)
    assert last.reference == last.weights + told
    if topology.world_size == 1:
        layer = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16 + 2 * 8  # q k v, o, gate up down, two norms
        assert last.weights == 4 * (4 * layer + 2 * 128 * 8 + 8)


def test_of_a_module_that_learns_beside_an_adapter_the_reference_has_the_old_one() -> None:
    plain, learns = (memory(work_of("dpo", Topology(), chosen=name))[0] for name in ("", names.HEAD))
    assert learns.reference - plain.reference == 4 * 128 * 8


@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
def test_a_reference_costs_time_and_nothing_else(topology: Topology) -> None:
    with_reference, without = (step_time(setup(work_of(name, topology, "full"))) for name in ("dpo", "orpo"))
    assert with_reference.reference_s > 0 and without.reference_s == 0
    assert replace(with_reference, reference_s=0.0, shared_s=without.shared_s) == without
    backward = without.total_s - without.optimizer_s - without.data_s
    assert 0.2 * backward < with_reference.reference_s < 0.5 * backward


def test_the_reference_is_one_forward_pass_counted_by_hand() -> None:
    """On a device whose memory and messages take no time: 2 operations a weight and token, and attention's."""
    rate = 1e6
    free = replace(device("cpu"), peaks={"fp32": rate}, best={}, memory_rate=1e30, link_rate=1e30, message_s=1e-30)
    layer = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16
    scores = 2 * (8 + 8) * (TOKENS + 1) / 2
    tokens = 2 * ROWS * TOKENS
    for tuner in ("lora", "full"):
        for pp in (1, 2):
            found = step_time(replace(setup(work_of("dpo", Topology(pp=pp), tuner)), device=free))
            per_layer, head = 2 * layer + scores, 2 * 8 * 128
            stages = [4 * per_layer + head] if pp == 1 else [2 * per_layer, 2 * per_layer + head]
            waits = (sum(stages) - max(stages)) * 2 * MICRO * TOKENS
            assert found.reference_s == pytest.approx((tokens * max(stages) + waits) / rate, rel=1e-6)


def planned(objective: str, tuner: str = "lora") -> tuple[JobConfig, Plan]:
    job = JobConfig(
        objective=ObjectiveConfig(objective),
        tuner=TunerConfig(name=tuner),
        batch=BatchConfig(global_sequences=64, sequence_tokens=4096),
    )
    return job, make_plan(job, LLAMA3_8B, H100X8)


def test_what_is_not_built_is_shown_as_what_it_would_be() -> None:
    job, plan = planned("dpo", "full")
    assert plan.reasons[0] == "objective.name=dpo is not built: this is what it would be, train refuses it"
    facts = plan_facts(plan, job, LLAMA3_8B)
    assert facts["learns"] == "dpo: a row is a pair of sequences, the reference is a second, frozen copy of the model"
    assert facts["batch"].startswith("64 pairs = ") and "tokens a sequence" in facts["rows"]
    assert Plan.from_json(plan.to_json()) == plan
    _, plain = planned("sft", "full")
    assert not any("not built" in reason for reason in plain.reasons)


def test_utilisation_counts_both_sequences_and_the_reference() -> None:
    """Under full tuning a token needs three passes, with a reference four."""
    speeds = {}
    for objective in ("sft", "orpo", "dpo"):
        job, plan = planned(objective, "full")
        advice = advise(job, LLAMA3_8B, H100X8, plan)
        tokens = 64 * 4096 * (1 if objective == "sft" else 2)
        assert advice.tokens_per_s_per_rank == pytest.approx(tokens / plan.step_time.total_s / plan.ranks_used)
        speeds[objective] = advice.utilisation / advice.tokens_per_s_per_rank
    assert speeds["orpo"] == pytest.approx(speeds["sft"])
    assert speeds["dpo"] == pytest.approx(4 / 3 * speeds["sft"])


@pytest.mark.parametrize("objective", sorted(set(GOALS) - set(BUILT.objectives)))
def test_only_what_is_built_trains(objective: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_trainable(objective)
    assert f"objective.name={objective} can be planned but not trained yet; what trains is sft" in str(caught.value)
    assert caught.value.hint == "objective=sft"
    check_trainable("sft")


def test_the_command_line_plans_and_refuses_to_train(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["model=llama3_8b", "data=lighthouse", "cluster=h100x8", "batch.global_sequences=64", "objective=dpo"]
    assert main(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["objective"], plan["is_built"], plan["step_time"]["reference_s"] > 0) == ("dpo", False, True)
    assert main(["plan", *words]) == 0
    assert "learns    dpo: a row is a pair" in capsys.readouterr().out
    assert main(["train", *words, f"run_dir={tmp_path}/run"]) == 64
    assert "objective.name=dpo can be planned but not trained" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["plan", *words[:-1], "objective.name=dop"]) == 64
    assert "objective.name=dpo" in capsys.readouterr().err
