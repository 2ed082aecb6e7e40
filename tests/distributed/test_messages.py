"""The planner's count of messages against what ranks really send: a small layer's time is that of its messages."""

from __future__ import annotations

import pytest

from parallel.topology import Topology
from tests.helpers.cells import in_grid
from tests.helpers.messages import expected, sent
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

FINER = ("full", "full-sp", "lora-recomputed", "dora-sp", "dora-recomputed", "latent", "latent-full-sp", "gemma2")
CELLS = {
    "full": Run(full=True),
    "full-sp": Run(full=True, sp=True),
    "lora": Run(),
    "lora-sp": Run(sp=True),
    "lora-recomputed": Run(recompute="full"),
    "lora-sp-recomputed": Run(sp=True, recompute="full"),
    "dora": Run(dora=True),
    "dora-sp": Run(dora=True, sp=True),
    "latent": Run("deepseek_v2", changes=(("first_k_dense_replace", 4),)),
    "latent-sp": Run("deepseek_v2", sp=True, changes=(("first_k_dense_replace", 4),)),
    "latent-full-sp": Run("deepseek_v2", sp=True, full=True, changes=(("first_k_dense_replace", 4),)),
    "dora-recomputed": Run(dora=True, recompute="full"),
    "gemma2": Run("gemma2"),
    "attention-only": Run(targets=("q_proj", "k_proj", "v_proj", "o_proj")),
}


@pytest.mark.parametrize("cell", in_grid(CELLS, FINER))
def test_a_layers_messages_are_those_that_ranks_send(pool: Pool, cell: str) -> None:
    run = CELLS[cell].on(topology=Topology(tp=2))
    few, many = (run.on(changes=(*run.changes, ("num_hidden_layers", layers))) for layers in (2, 4))
    counts = [pool.run(2, sent, run)[0] for run in (few, many)]
    assert (counts[1] - counts[0]) / 2 == expected(many)
