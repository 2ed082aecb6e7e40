"""DoRA: the same run as in PEFT, on every topology, from any checkpoint; its magnitudes are never lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.topology import Topology
from tests.helpers import peft_loop, runs
from tests.helpers.cells import in_grid
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

LOSS_RTOL, TENSOR_RTOL = 1e-5, 1e-4
STEPS = 4
PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp3": {"topology": Topology(tp=3)},
    "tp2-sp-pp2": {"topology": Topology(tp=2, pp=2), "sp": True},
    "dp2-distributed": {"topology": Topology(dp=2), "distributed": True},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "rslora": ("llama", {"rslora": True}),
    "some-targets": ("llama", {"targets": ("k_proj", "up_proj", "o_proj")}),
    "dropout": ("llama", {"dropout": 0.3}),
    "bias": ("qwen2", {}),
    "bias-dropout": ("qwen2", {"dropout": 0.3, "targets": ("q_proj", "v_proj", "down_proj")}),
    "grouped-heads": ("qwen3", {}),
    "ends": ("qwen2", {"targets": ("lm_head", "embed_tokens", "q_proj")}),
    "ends-dropout": ("qwen2", {"targets": ("lm_head", "embed_tokens"), "dropout": 0.3}),
    "ends-rslora": ("mixtral", {"targets": ("lm_head", "embed_tokens"), "rslora": True}),
    "scaled-embedding": ("gemma3_text", {"targets": ("embed_tokens", "q_proj")}),
}
RUNS = [
    *(("llama", place) for place in PLACES),
    *(("dropout", place) for place in ("one", "tp3", "tp2-sp-pp2")),
    *((case, "tp2-sp-pp2") for case in ("some-targets", "bias", "bias-dropout", "grouped-heads")),
    ("bias-dropout", "one"),
    ("rslora", "one"),
    *(("ends", place) for place in PLACES),
    *(("ends-dropout", place) for place in ("one", "tp3", "tp2-sp-pp2")),
    ("ends-rslora", "one"),
    *(("scaled-embedding", place) for place in ("one", "tp2-sp-pp2")),
]


def weights(states: list[list[tuple[Any, ...]]]) -> dict[str, torch.Tensor]:
    return {name: value for (name, kind), value in runs.merge(states).items() if kind == "weight"}


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[..., Path]) -> Callable[[str], Any]:
    """PEFT's losses, norms and adapter of a case, computed once."""
    known: dict[str, Any] = {}

    def of(case: str) -> Any:
        if case not in known:
            family, changes = CASES[case]
            run = Run(family, steps=STEPS, dora=True, learning_rate=1e-2, **changes)
            model, clock = peft_loop.make_model(run, tiny_model(family))
            known[case] = (*peft_loop.train(run, model, clock), peft_loop.adapter(model))
        return known[case]

    return of


@pytest.mark.parametrize(("case", "place"), in_grid(RUNS))
def test_training_equals_peft(
    pool: Pool, tiny_model: Callable[..., Path], oracle: Callable[[str], Any], case: str, place: str
) -> None:
    """At a rate at which directions turn far enough that it matters whether |V| follows them."""
    losses, norms, adapter = oracle(case)
    family, changes = CASES[case]
    run = Run(family, steps=STEPS, dora=True, learning_rate=1e-2, **changes, **PLACES[place])
    found = pool.run(run.topology.world_size, runs.train, run, str(tiny_model(family)))
    for theirs, ours, _ in found:
        assert theirs == pytest.approx(losses, rel=LOSS_RTOL)
        assert ours == pytest.approx(norms, rel=1e-4)
    peft_loop.assert_equal(weights([state for _, _, state in found]), adapter, TENSOR_RTOL)
