"""The oracle of adapters on experts and routers is transformers + peft, which holds a layer's experts joined.

PEFT's joined B of gate and up is dense. Here each has an adapter of its own, so the oracle lets no gradient into the
blocks of B that would mix them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.seeding import kaiming_uniform
from parallel.topology import Topology
from tests.distributed.test_experts import distance
from tests.distributed.test_peft_oracle import LOSS_RTOL, TENSOR_RTOL, backward, weights
from tests.helpers import runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

R, EXPERTS, STEPS = 4, 4, 4
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
TARGETS = {
    "qwen3_moe": ("q_proj", "gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("q_proj", "gate", "w1", "w3", "w2"),
}


def logical_halves(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Parameter, Callable]]:
    """For every logical half its parameter in PEFT's model, and the view of that which is the half."""

    def slices(expert: int, part: int, rank: int) -> tuple[Callable, Callable]:
        rows = slice(expert * rank + part * R, expert * rank + part * R + R)

        def half_b(joined: torch.Tensor) -> torch.Tensor:
            own = joined.view(joined.shape[0], rank, EXPERTS)[:, part * R : part * R + R, expert]
            return own.chunk(rank // R)[part]

        return (lambda joined: joined[rows]), half_b

    found: dict[str, tuple[torch.nn.Parameter, Callable]] = {}
    is_mixtral = model.config.model_type == "mixtral"
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            continue
        key, side = name.replace(".default", ""), "A" if ".lora_A." in name else "B"
        key = key.replace(".mlp.", ".block_sparse_moe.") if is_mixtral else key
        if ".experts." not in key:
            found[key] = parameter, lambda whole: whole
            continue
        parts = ("gate_proj", "up_proj") if ".base_layer." in key else ("down_proj",)
        if is_mixtral:
            parts = tuple(MIXTRAL[part] for part in parts)
        for expert in range(EXPERTS):
            for number, part in enumerate(parts):
                cuts = slices(expert, number, len(parts) * R)
                stem = key.split(".experts.")[0]
                found[f"{stem}.experts.{expert}.{part}.lora_{side}.weight"] = parameter, cuts[side == "B"]
    return found


def train_with_peft(run: Run, folder: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """An ordinary loop over the same global batches, from the values that the seed gives."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=R, lora_alpha=8, target_modules=list(run.targets), task_type="CAUSAL_LM"))
    halves = logical_halves(model)
    own = {id(parameter): torch.zeros_like(parameter) for parameter, _ in halves.values()}
    with torch.no_grad():
        for key, (parameter, cut) in halves.items():
            cut(own[id(parameter)]).fill_(1.0)
            if ".lora_A." in key:
                half = cut(parameter)
                half.copy_(kaiming_uniform(tuple(half.shape), run.seed, "lora_A", key))  # type: ignore[arg-type]
    trained = list({id(parameter): parameter for parameter, _ in halves.values()}.values())
    mixed = [parameter for parameter in trained if not own[id(parameter)].all()]
    assert len(mixed) == 4  # one joined B of gate and up per layer
    for parameter in trained:
        parameter.register_hook(own[id(parameter)].mul)
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=0.0)
    losses, norms = [], []
    for step in range(run.steps):
        optimizer.zero_grad()
        losses.append(backward(run, step, model))
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
    return losses, norms, {key: cut(parameter.detach()).clone() for key, (parameter, cut) in halves.items()}


@pytest.mark.parametrize(
    ("family", "topology", "sp"),
    [
        ("qwen3_moe", Topology(), False),
        ("qwen3_moe", Topology(tp=2, dp=2, ep=2, etp=2), True),
        ("qwen3_moe", Topology(pp=2, dp=2, ep=2), False),
        ("mixtral", Topology(tp=2, dp=2, ep=2), True),
    ],
    ids=str,
)
def test_training_adapters_of_experts_and_router_equals_peft(
    pool: Pool, tiny_model: Callable[..., Path], family: str, topology: Topology, sp: bool
) -> None:
    folder = tiny_model(family)
    run = Run(family, topology, steps=STEPS, sp=sp, targets=TARGETS[family])
    found = pool.run(topology.world_size, runs.train, run, str(folder))
    losses, norms, adapter = train_with_peft(run, folder)
    assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
    assert distance(weights([state for _, _, state in found]), adapter) <= TENSOR_RTOL
