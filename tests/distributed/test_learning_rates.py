"""LoRA+, frozen weights and learning rates by pattern: the same as torch's parameter groups in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.seeding import DropoutClock
from parallel.topology import Topology
from tests.helpers import peft_loop, runs
from tests.helpers.cells import in_grid
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

LOSS_RTOL = 1e-5
PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2-sp-pp2": {"topology": Topology(tp=2, pp=2), "sp": True},
    "dp2-distributed": {"topology": Topology(dp=2), "distributed": True},
}


def weights(states: list[list[tuple[Any, ...]]]) -> dict[str, torch.Tensor]:
    return {name: value for (name, kind), value in runs.merge(states).items() if kind == "weight"}


@pytest.mark.parametrize("place", in_grid(PLACES))
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_loraplus_is_pefts(pool: Pool, tiny_model: Callable[..., Path], dora: bool, place: str) -> None:
    """B, and magnitudes too, learn 8 times as fast as A, by PEFT's own create_loraplus_optimizer."""
    from peft.optimizers import create_loraplus_optimizer

    folder = tiny_model("llama")
    run = Run(steps=4, dora=dora, lr_ratio=8.0, **PLACES[place])
    model, clock = peft_loop.make_model(run, folder)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=run.learning_rate, loraplus_lr_ratio=8.0)
    losses, _ = peft_loop.train(run, model, clock, optimizer)
    found = pool.run(run.topology.world_size, runs.train, run, str(folder))
    assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
    peft_loop.assert_equal(weights([state for _, _, state in found]), peft_loop.adapter(model))


FREEZE = ("embed_tokens", r"model\.layers\.[01]\..*", ".*layernorm")
RATIOS = (("mlp.down_proj", 0.25), ("lm_head", 4.0), (r"model\.layers\.3\.self_attn\.[qkv]_proj", 0.5))


@pytest.mark.parametrize("place", in_grid([*PLACES, "recompute"]))
def test_frozen_weights_and_rates_by_pattern(pool: Pool, tiny_model: Callable[..., Path], place: str) -> None:
    """The first stage of PP=2 is frozen whole; the loop on transformers says which weight is in which group."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model("qwen2")
    where: dict[str, Any] = {"recompute": "full"} if place == "recompute" else PLACES[place]
    run = Run("qwen2", full=True, freeze=FREEZE, lr_ratios=RATIOS, learning_rate=1e-3, **where)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "layers.0." in name or "layers.1." in name or "layernorm" in name:
            parameter.requires_grad_(False)
            continue
        ratio = 0.25 if "down_proj" in name else 4.0 if "lm_head" in name else 1.0
        ratio = 0.5 if "layers.3" in name and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") else ratio
        groups.setdefault(ratio, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": each, "lr": ratio * run.learning_rate} for ratio, each in groups.items()], weight_decay=0.0
    )
    losses, norms = peft_loop.train(run, model, DropoutClock(run.seed, run.tokens), optimizer)
    found = pool.run(run.topology.world_size, runs.train, run, str(folder))
    assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
    state = runs.merge([state for _, _, state in found])
    ours = weights([state for _, _, state in found])
    peft_loop.assert_equal(ours, {name: value.detach() for name, value in model.named_parameters()})
    for name, parameter in model.named_parameters():
        assert ((name, "exp_avg") in state) == parameter.requires_grad, name  # no moments of what does not learn
        assert parameter.requires_grad or torch.equal(ours[name], before[name]), name
