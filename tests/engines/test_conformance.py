"""What every engine promises (parallel.engine.Engine), here for megatron."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.topology import Topology
from tests.helpers import runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

ELSEWHERE = {
    "one": {},
    "tp2": {"topology": Topology(tp=2)},
    "pp2-dp2": {"topology": Topology(pp=2, dp=2)},
    "dp2-distributed": {"topology": Topology(dp=2), "distributed": True},
    "cp2": {"topology": Topology(cp=2)},
    "cp2-pp2-ulysses": {"topology": Topology(cp=2, pp=2), "cp_comm": "ulysses"},
    "cp2-dp2-distributed": {"topology": Topology(cp=2, dp=2), "distributed": True},
    "tp2-dp2-distributed": {"topology": Topology(tp=2, dp=2), "distributed": True},
}
STEPS, COMPLETED = 5, 2


def state_of(pool: Pool, run: Run) -> dict[tuple[str, str], Any]:
    found = pool.run(run.topology.world_size, runs.train, run)
    return {key: value.numpy() for key, value in runs.merge([state for _, _, state in found]).items()}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        *[("one", "tp2"), ("tp2-dp2-distributed", "pp2-dp2"), ("cp2-dp2-distributed", "cp2-pp2-ulysses")],
        *(
            pytest.param(*pair, marks=pytest.mark.grid)
            for pair in [("pp2-dp2", "one"), ("tp2", "dp2-distributed"), ("cp2", "one"), ("one", "cp2-dp2-distributed")]
        ),
    ],
)
def test_state_loads_on_any_topology_and_the_run_goes_on(pool: Pool, full: bool, before: str, after: str) -> None:
    """Weights, moments and Adam's count: losses equal the uninterrupted run's to 1e-5 relative."""
    run = Run(steps=STEPS, full=full, dropout=0.0 if full else 0.2)
    whole = pool.run(1, runs.train, run)[0]
    saved = state_of(pool, run.on(steps=COMPLETED, **ELSEWHERE[before]))
    there = run.on(**ELSEWHERE[after])
    found = pool.run(there.topology.world_size, runs.go_on, there, saved, COMPLETED)
    assert found[0][0] == pytest.approx(whole[0][COMPLETED:], rel=1e-5)
    reached, expected = runs.merge([state for _, state in found]), runs.merge([whole[2]])
    for key, value in expected.items():
        assert torch.linalg.vector_norm(reached[key] - value) <= 1e-4 * torch.linalg.vector_norm(value), key


@pytest.mark.parametrize("distributed", [False, True])
def test_master_weights_of_a_16_bit_run_are_state(pool: Pool, distributed: bool) -> None:
    """A bf16 run that goes on from its state is bit-identical: fp32 masters are saved beside the moments."""
    run = Run(steps=4, full=True, precision="bf16", distributed=distributed, topology=Topology(dp=2))
    whole = pool.run(2, runs.train, run)
    saved = state_of(pool, run.on(steps=2))
    kinds = {kind for _, kind in saved}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "master"}
    found = pool.run(2, runs.go_on, run, saved, 2)
    assert found[0][0] == whole[0][0][2:]
    reached, expected = runs.merge([state for _, state in found]), runs.merge([state for _, _, state in whole])
    assert all(torch.equal(reached[key], value) for key, value in expected.items())


def test_a_16_bit_base_with_adapters_in_fp32(pool: Pool) -> None:
    """bf16 follows fp32 roughly; adapters stay in fp32, so they have no master copy."""
    run = Run(steps=3)
    plain, half = pool.run(1, runs.train, run)[0], pool.run(1, runs.train, run.on(precision="bf16"))[0]
    assert half[0] == pytest.approx(plain[0], rel=2e-2)
    assert half[0] != plain[0]
    assert {kind for _, kind, *_ in half[2]} == {"weight", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("name", ["one", "tp2", "pp2-dp2", "cp2"])
def test_evaluate_is_the_training_loss_and_changes_nothing(pool: Pool, name: str) -> None:
    run = Run(**ELSEWHERE[name])
    for before, trained, after in pool.run(
        run.topology.world_size, runs.evaluate_and_train, run.on(learning_rate=0.02)
    ):
        assert before == pytest.approx(trained, rel=1e-6)
        assert after < trained


def test_the_same_seed_gives_the_same_adapter_on_every_topology(pool: Pool) -> None:
    """Bit for bit, before any step."""
    reference = runs.merge([pool.run(1, runs.train, Run(steps=0))[0][2]])
    for name in ("tp2", "pp2-dp2", "cp2-dp2-distributed"):
        run = Run(steps=0, **ELSEWHERE[name])
        found = runs.merge([state for _, _, state in pool.run(run.topology.world_size, runs.train, run)])
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[key], value) for key, value in reference.items())
    other = runs.merge([pool.run(1, runs.train, Run(steps=0, seed=4))[0][2]])
    assert not any(
        torch.equal(other[key], value)
        for key, value in reference.items()
        if ".lora_A." in key[0] and key[1] == "weight"
    )


def test_frozen_weights_have_no_buffers_and_no_state(pool: Pool) -> None:
    state = pool.run(1, runs.train, Run(steps=1))[0][2]
    assert all(".lora_" in name for name, *_ in state)
    elements = sum(np.prod(box.size) for _, kind, _, box, _ in state if kind == "weight")
    assert pool.run(1, runs.gradient_buffer_elements, Run())[0] - elements < 256  # padding of the buffer


def test_a_tensor_that_gets_no_gradient_stops_the_first_step(pool: Pool) -> None:
    (message,) = pool.run(1, runs.gradients_that_never_come, Run())
    first = "decoder.layers.0.self_attention.linear_proj.parts.o.unused"
    assert message == f"1 trainable tensors got no gradient in the first step, first {first}"


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_base_is_let_go_once_it_is_read(pool: Pool, tiny_model: Callable[..., Path], init: str) -> None:
    """An open reader maps whole files, and they count as memory of the process."""
    assert not pool.run(1, runs.keeps_its_base, Run(init=init), str(tiny_model("llama")))[0]


def test_an_engine_that_is_gone_leaves_no_threads(pool: Pool) -> None:
    """Those of a gloo group poll: a process that opens many engines would have no time left for the last."""
    counts = pool.run(1, runs.threads_after, 4)[0]
    assert len(set(counts)) == 1, counts
