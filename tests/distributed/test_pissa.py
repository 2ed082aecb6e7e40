"""PiSSA: the run that PEFT makes of it, on every topology, without a changed base."""

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

PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp3": {"topology": Topology(tp=3)},
    "tp2-sp-pp2": {"topology": Topology(tp=2, pp=2), "sp": True},
    "tp2-dp2-distributed": {"topology": Topology(tp=2, dp=2), "distributed": True},
}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora-rslora": {"dora": True, "rslora": True},
    "head": {"family": "qwen2", "targets": ("lm_head", "q_proj")},
}


def with_positive_largest(model: Any) -> dict[str, torch.Tensor]:
    """Turn the signs of PEFT's singular vectors as ours are, and give the start as it is under PEFT's keys."""
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
            signs = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).sign()
            a.mul_(signs)
            b.mul_(signs.t())
    return {name: value.clone() for name, value in peft_loop.adapter(model).items()}


def as_rank_2r(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter on the original base: ``W_res + s B A = W + s [B, -B0] [A; A0]``."""
    joined = {}
    for name, value in end.items():
        if name.endswith("lora_A.weight"):
            value = torch.cat([value, start[name]])
        elif name.endswith("lora_B.weight"):
            value = torch.cat([value, -start[name]], dim=1)
        joined[name] = value
    return joined


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[..., Path]) -> Callable[[str], Any]:
    """PEFT's losses, norms and adapter of a case, computed once."""
    known: dict[str, Any] = {}

    def of(case: str) -> Any:
        if case not in known:
            run = Run(steps=4, init="pissa", **CASES[case])
            model, clock = peft_loop.make_model(run, tiny_model(run.family), init_lora_weights="pissa")
            start = with_positive_largest(model)
            losses, norms = peft_loop.train(run, model, clock)
            known[case] = losses, norms, as_rank_2r(start, peft_loop.adapter(model))
        return known[case]

    return of


@pytest.mark.parametrize(
    ("case", "place"),
    in_grid(
        [
            *(("lora", place) for place in PLACES),
            ("dora-rslora", "one"),
            ("dora-rslora", "tp2-sp-pp2"),
            ("head", "tp3"),
            ("head", "tp2-sp-pp2"),
        ]
    ),
)
def test_training_equals_peft(
    pool: Pool, tiny_model: Callable[..., Path], oracle: Callable[[str], Any], case: str, place: str
) -> None:
    losses, norms, adapter = oracle(case)
    run = Run(steps=4, init="pissa", **CASES[case], **PLACES[place])
    found = pool.run(run.topology.world_size, runs.train, run, str(tiny_model(run.family)))
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
    state = runs.merge([state for _, _, state in found])  # which also checks that replicas are equal bit for bit
    peft_loop.assert_equal({name: value for (name, kind), value in state.items() if kind == "weight"}, adapter)
    moments = {name: value.shape for (name, kind), value in state.items() if kind == "exp_avg"}
    assert {moments[name][0] for name in moments if "lora_A" in name} == {4}  # the fixed half has none


def test_the_start_is_the_base(pool: Pool, tiny_model: Callable[..., Path]) -> None:
    """Before a step the adapter changes nothing, and A is no random matrix."""
    folder = str(tiny_model("llama"))
    run = Run(init="pissa", topology=Topology(tp=2))
    plain = pool.run(1, runs.logits, Run(), folder, [[5, 9, 3, 77]])[0]
    assert abs(pool.run(2, runs.logits, run, folder, [[5, 9, 3, 77]])[0] - plain).max() <= 1e-5
