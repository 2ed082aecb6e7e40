"""A step that is refused changes nothing on any rank, and the run goes on as if it had not been tried."""

from __future__ import annotations

import pytest
import torch

from parallel.topology import Topology
from tests.distributed.test_experts import TOPOLOGIES
from tests.helpers import runs
from tests.helpers.broken import train_with_an_error
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

RUNS = {
    "lora-tp2-pp2": Run(topology=Topology(tp=2, pp=2), sp=True, dropout=0.2),
    "bf16-dp2-distributed": Run(topology=Topology(dp=2), distributed=True, full=True, precision="bf16"),
    "cp2-pp2": Run(topology=Topology(cp=2, pp=2)),
    "experts-with-biases": Run("deepseek_v3", full=True, bias_rate=0.05, learning_rate=1e-4, **TOPOLOGIES["ep2-pp2"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_gradient_that_is_no_number_on_one_rank_is_seen_by_all_and_undoes_itself(pool: Pool, name: str) -> None:
    run = RUNS[name]
    ranks = run.topology.world_size
    undisturbed = pool.run(ranks, runs.train, run)
    found = pool.run(ranks, train_with_an_error, run, ranks - 1)
    losses = undisturbed[0][0]
    for tries, is_same, _ in found:
        assert tries == [(losses[0], True), (losses[1], False), (losses[1], True), (losses[2], True)]
        assert is_same
    expected = runs.merge([state for _, _, state in undisturbed])
    reached = runs.merge([state for _, _, state in found])
    assert expected.keys() == reached.keys()
    assert all(torch.equal(reached[key], value) for key, value in expected.items())
