"""The balancing loss is that of its formula, on transformers' routers, and no cut and no padding changes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from parallel.topology import Topology
from tests.distributed.test_experts import TOPOLOGIES, Outcome, assert_same, distance, one_process
from tests.distributed.test_peft_oracle import LOSS_RTOL, TENSOR_RTOL, weights
from tests.helpers import runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

__all__ = ["one_process"]
COEFFICIENT = 0.5


def rows(width: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """24 rows of 4 to 12 tokens, right-padded; labels begin and end anywhere."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for _ in range(24):
        length = int(torch.randint(4, 13, (1,), generator=generator))
        tokens = torch.randint(1, 101, (length,), generator=generator).tolist()
        first = int(torch.randint(0, 3, (1,), generator=generator))
        labels = [-100] * first + tokens[first + 1 :] + [-100]
        padding = width - length
        made.append((tuple(tokens + [0] * padding), tuple(labels + [-100] * padding)))
    return tuple(made)


RUN = Run(family="qwen3_moe", full=True, balancing_loss=COEFFICIENT, rows=rows(12))


def balancing(logits: torch.Tensor, labels: torch.Tensor, chosen_per_token: int) -> torch.Tensor:
    """The sum over sequences of their labels times their loss, by loops: ``logits [b, s, E]``, ``labels [b, s]``."""
    total = logits.new_zeros(())
    for scores, learned in zip(logits.softmax(dim=-1), labels != -100, strict=True):
        length = int(learned.nonzero().max()) + 1
        seen = scores[:length]
        fractions = torch.zeros(scores.shape[-1])
        for token in seen:
            fractions[token.topk(chosen_per_token).indices] += scores.shape[-1] / (chosen_per_token * length)
        total = total + learned.sum() * (fractions * seen.mean(dim=0)).sum()
    return total


def train_with_transformers(run: Run, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(run.steps):
        batch = runs.global_batch(run, step)
        tokens, labels = torch.stack([row[0] for row in batch]), torch.stack([row[1] for row in batch])
        seen.clear()
        optimizer.zero_grad()
        summed = cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        count = (labels != -100).sum()
        router_losses = sum(balancing(each.view(*tokens.shape, -1), labels, 2) for each in seen)
        ((summed + COEFFICIENT * router_losses) / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(summed / count))
    return losses, {name: value.detach() for name, value in model.named_parameters() if ".experts." not in name}


def test_the_loss_is_that_of_the_formula(pool: Pool, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3_moe")
    run = RUN.on(steps=4, learning_rate=1e-3)
    losses, tensors = train_with_transformers(run, folder)
    found, _, state = pool.run(1, runs.train, run, str(folder))[0]
    assert found == pytest.approx(losses, rel=LOSS_RTOL)
    assert (
        distance({name: value for name, value in weights([state]).items() if name in tensors}, tensors) <= TENSOR_RTOL
    )
    without = pool.run(1, runs.train, run.on(balancing_loss=0.0), str(folder))[0][0]
    assert without[0] == pytest.approx(losses[0], rel=LOSS_RTOL)  # it is not part of the reported loss
    assert without[-1] != pytest.approx(losses[-1], rel=1e-4)  # but the model learns from it


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_sequences": 8},
        {"tokens": 16, "rows": rows(16)},
        {"recompute": "full"},
        TOPOLOGIES["tp2-ep2"],
        TOPOLOGIES["ep2-pp2"],
        TOPOLOGIES["etp2-tp2-dp2-distributed"],
        {"topology": Topology(cp=2, ep=2)},
        {"topology": Topology(cp=2, tp=2), "sp": True},
    ],
    ids=["micro8", "padding", "recompute", "tp2-ep2", "ep2-pp2", "etp2-tp2-dp2-distributed", "cp2-ep2", "cp2-tp2"],
)
def test_no_cut_and_no_padding_changes_it(
    pool: Pool, one_process: Callable[[Run], Outcome], changes: dict[str, object]
) -> None:
    assert_same(pool, one_process(RUN), RUN.on(**changes))
