"""Weights that learn whole beside an adapter (PEFT's ``modules_to_save``): embedding, head and norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.topology import Topology
from tests.helpers import peft_loop, runs
from tests.helpers.cells import in_grid
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

CASES: dict[str, dict[str, Any]] = {
    "head": {"family": "qwen2", "modules_to_save": ("embed_tokens", "lm_head", "norm")},
    "tied": {"family": "llama", "modules_to_save": ("embed_tokens",)},
}
PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp3": {"topology": Topology(tp=3)},
    "tp2-sp-pp2": {"topology": Topology(tp=2, pp=2), "sp": True},
    "dp2-distributed": {"topology": Topology(dp=2), "distributed": True},
}


@pytest.mark.parametrize(
    ("case", "place"), in_grid([*(("tied", place) for place in PLACES), ("head", "one"), ("head", "tp2-sp-pp2")])
)
def test_training_equals_peft(pool: Pool, tiny_model: Callable[..., Path], case: str, place: str) -> None:
    run = Run(steps=4, **CASES[case], **PLACES[place])
    folder = tiny_model(run.family)
    model, clock = peft_loop.make_model(run, folder)
    losses, norms = peft_loop.train(run, model, clock)
    found = pool.run(run.topology.world_size, runs.train, run, str(folder))
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
    state = runs.merge([state for _, _, state in found])
    ours = {name: value for (name, kind), value in state.items() if kind == "weight"}
    peft_loop.assert_equal(ours, peft_loop.adapter(model))
    assert ("base_model.model.model.embed_tokens.weight", "exp_avg") in state


def test_a_16_bit_embedding_has_a_master_copy(pool: Pool) -> None:
    """Beside adapters in fp32, which need none."""
    run = Run("qwen2", precision="bf16", modules_to_save=("lm_head",), topology=Topology(tp=2))
    losses, _, state = pool.run(2, runs.train, run)[0]
    kinds = {(name, kind) for name, kind, *_ in state if kind == "master"}
    assert kinds == {("base_model.model.lm_head.weight", "master")}
    assert losses == pytest.approx(
        pool.run(1, runs.train, run.on(precision="fp32", topology=Topology()))[0][0], rel=2e-2
    )
