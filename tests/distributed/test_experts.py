"""Experts on every topology: what EP, ETP, TP with SP, PP and DP do to a run is nothing, to the usual tolerances."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.certify.bench import EPS
from parallel.topology import Topology
from tests.distributed.test_parity import LOSS_RTOL, TENSOR_RTOL
from tests.helpers import runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")
TOPOLOGIES = {
    "ep2": {"topology": Topology(dp=2, ep=2)},
    "ep4": {"topology": Topology(dp=4, ep=4)},
    "ep2-dp4": {"topology": Topology(dp=4, ep=2)},
    "etp2": {"topology": Topology(dp=2, etp=2)},
    "tp2-etp1": {"topology": Topology(tp=2), "sp": True},
    "tp2-etp2": {"topology": Topology(tp=2, etp=2), "sp": True},
    "tp2-ep2": {"topology": Topology(tp=2, ep=2), "sp": True},
    "ep2-tp2-dp2": {"topology": Topology(tp=2, dp=2, ep=2), "sp": True},
    "ep2-etp2": {"topology": Topology(tp=2, dp=2, ep=2, etp=2), "sp": True},
    "ep2-pp2": {"topology": Topology(pp=2, dp=2, ep=2)},
    "ep2-dp4-distributed": {"topology": Topology(dp=4, ep=2), "distributed": True},
    "etp2-tp2-dp2-distributed": {"topology": Topology(tp=2, dp=2, etp=2), "sp": True, "distributed": True},
}
RUNS = {
    "attention": Run(family="qwen3_moe", targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "experts": Run(family="qwen3_moe", targets=EXPERTS),
    "full": Run(family="qwen3_moe", full=True),
}
Outcome = tuple[list[float], list[float], dict[tuple[str, str], torch.Tensor]]


@pytest.fixture(scope="module")
def one_process(pool: Pool) -> Callable[[Run], Outcome]:
    """What a run is on one process: losses, gradient norms, state. Each run is done once."""
    known: dict[Run, Outcome] = {}

    def outcome(run: Run) -> Outcome:
        if run not in known:
            losses, norms, state = pool.run(1, runs.train, run)[0]
            known[run] = losses, norms, runs.merge([state])
        return known[run]

    return outcome


def distance(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> float:
    """The largest relative Frobenius distance of a tensor; a tensor that is zero must be zero."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for key, value in expected.items():
        size, apart = torch.linalg.vector_norm(value), torch.linalg.vector_norm(found[key] - value)
        assert size > 0 or apart == 0, key
        worst = max(worst, float(apart / size) if size > 0 else 0.0)
    return worst


def assert_same(pool: Pool, expected: Outcome, there: Run) -> None:
    found = pool.run(there.topology.world_size, runs.train, there)
    for losses, norms, _ in found:
        assert losses == pytest.approx(expected[0], rel=LOSS_RTOL)
        assert norms == pytest.approx(expected[1], rel=1e-4)
    assert distance(runs.merge([state for _, _, state in found]), expected[2]) <= TENSOR_RTOL


SUBSUMED = ("ep2-dp4", "tp2-etp2", "ep2-tp2-dp2")  # by the cases that hold all of them


@pytest.mark.parametrize(
    ("what", "name"),
    [pytest.param("experts", name, marks=[pytest.mark.grid] * (name in SUBSUMED)) for name in TOPOLOGIES]
    + [
        pytest.param("full", name, marks=[pytest.mark.grid] * ("distributed" not in name and name != "ep2-pp2"))
        for name in TOPOLOGIES
        if name not in SUBSUMED
    ],
)
def test_a_run_equals_one_process(pool: Pool, one_process: Callable[[Run], Outcome], what: str, name: str) -> None:
    assert_same(pool, one_process(RUNS[what]), RUNS[what].on(**TOPOLOGIES[name]))


@pytest.mark.parametrize("name", ["ep2", "ep2-pp2"])
def test_experts_of_ranks_without_rows_equal_one_process(pool: Pool, name: str) -> None:
    """What padding chooses counts for nothing: neither in the balancing loss nor in what an expert learns."""
    run = RUNS["full"].on(global_sequences=3, micro_sequences=1, balancing_loss=0.02)
    losses, norms, state = pool.run(1, runs.train, run)[0]
    assert_same(pool, (losses, norms, runs.merge([state])), run.on(**TOPOLOGIES[name]))


@pytest.mark.parametrize("name", ["ep2", "etp2", "ep2-etp2", "ep2-pp2"])
def test_adapters_on_attention_equal_one_process(pool: Pool, one_process: Callable[[Run], Outcome], name: str) -> None:
    assert_same(pool, one_process(RUNS["attention"]), RUNS["attention"].on(**TOPOLOGIES[name]))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_of_experts_changes_nothing(
    pool: Pool, one_process: Callable[[Run], Outcome], recompute: str
) -> None:
    assert_same(pool, one_process(RUNS["experts"]), RUNS["experts"].on(recompute=recompute, **TOPOLOGIES["ep2-pp2"]))


@pytest.mark.parametrize("name", ["ep2", "ep4", "ep2-etp2"])
def test_fault_4_one_adapter_per_logical_expert_whatever_ep_is(pool: Pool, name: str) -> None:
    """The same names, shapes and, bit for bit, the same values: the seed's, not the expert-parallel rank's."""
    start = RUNS["experts"].on(steps=0)
    alone = runs.merge([pool.run(1, runs.train, start)[0][2]])
    weights = {key for key, kind in alone if kind == "weight" and ".experts." in key}
    assert len(weights) == 4 * 4 * 3 * 2  # layers, experts, gate up down, A B
    there = start.on(**TOPOLOGIES[name])
    found = runs.merge([state for _, _, state in pool.run(there.topology.world_size, runs.train, there)])
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[key], value) for key, value in alone.items())
    first = [
        value for (key, kind), value in alone.items() if kind == "weight" and key.endswith("gate_proj.lora_A.weight")
    ]
    assert not any(torch.equal(first[0], other) for other in first[1:])


def train_with_fault(run: Run, fault: str) -> list[tuple[Any, ...]]:
    """Train with a fault planted in this rank's engine; its pieces."""
    engine, groups = runs.open_engine(run)
    parameters = [parameter for chunk in engine._chunks for parameter in chunk.parameters()]
    if fault == "etp shares are not summed":
        for parameter in parameters:
            parameter.sum_over_expert_tp = False
    for step in range(run.steps):
        engine.train_step(runs.microbatches(run, step, groups.coordinate("dp")), run.rate(step))
    state = runs.pieces(engine)
    groups.close()
    return state


@pytest.mark.parametrize("name", ["etp2", "ep2-etp2"])
def test_fault_5_adapters_on_experts_under_etp_are_right(
    pool: Pool, one_process: Callable[[Run], Outcome], name: str
) -> None:
    """They equal one process; and were the shares of etp ranks not summed, replicas would drift apart."""
    there = RUNS["experts"].on(**TOPOLOGIES[name])
    assert_same(pool, one_process(RUNS["experts"]), there)
    spoilt = pool.run(there.topology.world_size, train_with_fault, there, "etp shares are not summed")
    with pytest.raises(AssertionError, match=r"replicas of .*experts.* differ"):
        runs.merge(spoilt)


@pytest.mark.parametrize("what", ["experts", "full"])
@pytest.mark.parametrize("name", ["one", "tp2-ep2"])
def test_an_expert_without_tokens_has_a_gradient_of_zero(
    pool: Pool, one_process: Callable[[Run], Outcome], what: str, name: str
) -> None:
    """Two tokens reach four of sixteen experts at most: the others' gradients are zero, not missing, in step 1.

    Of an expert with one token some gradients are hardly more than rounding, which Adam divides by itself: so its eps
    is that of certificates.
    """
    short = RUNS[what].on(global_sequences=1, micro_sequences=1, tokens=2, steps=2, eps=EPS)
    run = short.on(changes=(("num_experts", 16),))
    expected = one_process(run)
    silent = [
        key
        for (key, kind), value in expected[2].items()
        if kind == "exp_avg" and ".experts." in key and "lora_A" not in key and not value.any()
    ]
    assert len(silent) >= 4 * 3 * 4  # layers, gate up down, experts (two steps reach eight)
    if name != "one":
        assert_same(pool, expected, run.on(**TOPOLOGIES[name]))


@pytest.mark.parametrize("name", ["one", "ep2"])
def test_a_tensor_of_an_expert_that_takes_no_part_is_missed(pool: Pool, name: str) -> None:
    run = RUNS["experts"].on(**({} if name == "one" else TOPOLOGIES[name]))
    for message in pool.run(run.topology.world_size, unused_expert_tensor, run):
        assert message == (
            "1 trainable tensors got no gradient in the first step, first "
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.parts.expert_up.unused"
        )


def unused_expert_tensor(run: Run) -> str:
    """Train a step with a parameter in an expert that takes no part in it; the error's words."""
    from parallel.engines.megatron import NoGradientError

    engine, groups = runs.open_engine(run)
    part = engine._chunks[0].get_submodule("decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.parts.expert_up")
    part.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    try:
        engine.train_step(runs.microbatches(run, 0, groups.coordinate("dp")), 1e-3)
    except NoGradientError as error:
        return str(error)
    finally:
        groups.close()
    return ""


def train_and_save(run: Run, folder: str) -> None:
    """Train, and save a checkpoint into ``folder``."""
    from orchestrator.checkpoint.publish import Contents
    from orchestrator.checkpoint.save import save

    engine, groups = runs.open_engine(run)
    for step in range(run.steps):
        engine.train_step(runs.microbatches(run, step, groups.coordinate("dp")), run.rate(step))
    save(Path(folder), run.steps, engine.shards(), Contents("model" if run.full else "adapter", {}))
    groups.close()


def go_on_from(run: Run, folder: str) -> tuple[list[float], list[tuple[Any, ...]]]:
    """Load the checkpoint in ``folder`` and train to the end of the run; losses and pieces."""
    from orchestrator.checkpoint.load import open_checkpoint

    engine, groups = runs.open_engine(run)
    checkpoint = open_checkpoint(Path(folder))
    engine.load(checkpoint, moments=True)
    engine.set_optimizer_steps(checkpoint.step)
    losses = [
        engine.train_step(runs.microbatches(run, step, groups.coordinate("dp")), run.rate(step)).loss
        for step in range(checkpoint.step, run.steps)
    ]
    state = runs.pieces(engine)
    groups.close()
    return losses, state


@pytest.mark.parametrize(
    ("what", "before", "after"),
    [
        ("experts", "ep2", "etp2"),
        ("experts", "ep2-etp2", "ep2-dp4-distributed"),
        ("experts", "etp2-tp2-dp2-distributed", "ep4"),
        ("full", "ep2-pp2", "tp2-etp1"),
        ("full", "ep2-dp4-distributed", "ep2-etp2"),
    ],
)
def test_a_checkpoint_goes_on_under_another_cut_of_experts(
    pool: Pool, one_process: Callable[[Run], Outcome], tmp_path: Path, what: str, before: str, after: str
) -> None:
    """Weights, moments and Adam's count of experts: equal to the run that was never stopped."""
    losses, _, whole = one_process(RUNS[what])
    first, there = RUNS[what].on(steps=2, **TOPOLOGIES[before]), RUNS[what].on(**TOPOLOGIES[after])
    pool.run(first.topology.world_size, train_and_save, first, str(tmp_path))
    found = pool.run(there.topology.world_size, go_on_from, there, str(tmp_path))
    assert found[0][0] == pytest.approx(losses[2:], rel=LOSS_RTOL)
    assert distance(runs.merge([state for _, state in found]), whole) <= TENSOR_RTOL


def test_a_checkpoint_of_experts_is_the_same_bytes_from_every_cut(pool: Pool, tmp_path: Path) -> None:
    digests = set()
    for number, name in enumerate(["ep2", "ep2-etp2", "ep2-pp2", "ep2-dp4-distributed"]):
        run = RUNS["experts"].on(steps=0, **TOPOLOGIES[name])
        pool.run(run.topology.world_size, train_and_save, run, str(tmp_path / str(number)))
        files = sorted((tmp_path / str(number)).rglob("*.safetensors"))
        assert len(files) == 2  # weights, moments
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["ep2", "etp2-tp2-dp2-distributed"])
def test_a_16_bit_run_of_experts_goes_on_bit_for_bit(pool: Pool, name: str) -> None:
    """The fp32 masters of experts are state too."""
    run = RUNS["full"].on(steps=3, precision="bf16", **TOPOLOGIES[name])
    whole = pool.run(run.topology.world_size, runs.train, run)
    cut = runs.merge([state for _, _, state in pool.run(run.topology.world_size, runs.train, run.on(steps=2))])
    assert {kind for key, kind in cut if ".experts." in key} == {"weight", "exp_avg", "exp_avg_sq", "master"}
    saved = {key: value.numpy() for key, value in cut.items()}
    found = pool.run(run.topology.world_size, runs.go_on, run, saved, 2)
    assert found[0][0] == whole[0][0][2:]
    reached, expected = runs.merge([state for _, state in found]), runs.merge([state for _, _, state in whole])
    assert all(torch.equal(reached[key], value) for key, value in expected.items())
