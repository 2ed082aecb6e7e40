"""The balancing loss is that of its formula, on transformers' routers, and no cut and no padding changes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from parallel.balancing import Balance, BalancingClock, Positions
from parallel.sequence import SequenceCut
from parallel.topology import Topology
from tests.distributed.test_experts import TOPOLOGIES, Outcome, assert_same, distance, one_process
from tests.distributed.test_peft_oracle import LOSS_RTOL, TENSOR_RTOL, weights
from tests.helpers import runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

__all__ = ["one_process"]
COEFFICIENT, EXPERTS = 0.5, 4


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


def drop(weights: torch.Tensor, indices: torch.Tensor, factor: float) -> torch.Tensor:
    """The weights ``[tokens, k]`` of chosen experts without those that their expert has no room for, by loops."""
    kept, room = weights.clone(), math.ceil(indices.numel() / EXPERTS * factor)
    for expert in range(EXPERTS):
        asked = sorted((indices == expert).nonzero().tolist(), key=lambda place: -float(weights[*place]))
        for token, slot in asked[room:]:
            kept[token, slot] = 0.0
    return kept


def train_with_transformers(run: Run, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """By the formulas above; a run with a capacity in the micro-batches of one process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []

    def routed(module: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        seen.append(output[0])
        factor = run.capacity_factor
        return None if factor is None else (output[0], drop(output[1], output[2], factor), output[2])

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(routed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(run.steps):
        batch, loss = runs.global_batch(run, step), 0.0
        count = sum(int((labels != -100).sum()) for _, labels, _ in batch)
        optimizer.zero_grad()
        for first in range(0, len(batch), run.micro_sequences):
            rows = batch[first : first + run.micro_sequences]
            tokens, labels = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
            seen.clear()
            logits = model(tokens).logits.flatten(0, 1)
            summed = cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
            router_losses = sum(balancing(each.view(*tokens.shape, -1), labels, 2) for each in seen)
            ((summed + run.balancing_loss * router_losses) / count).backward()
            loss += float(summed.detach()) / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss)
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


def test_of_a_micro_batch_of_one_sequence_it_is_the_same(pool: Pool, one_process: Callable[[Run], Outcome]) -> None:
    assert_same(pool, one_process(RUN.on(micro_sequences=1)), RUN.on(micro_sequences=1, balancing_over="micro_batch"))


@pytest.mark.parametrize(
    "changes", [TOPOLOGIES["tp2-ep2"], {"topology": Topology(cp=2, pp=2)}], ids=["tp2-ep2", "cp2-pp2"]
)
def test_of_a_micro_batch_no_cut_within_it_changes_it(
    pool: Pool, one_process: Callable[[Run], Outcome], changes: dict[str, object]
) -> None:
    run = RUN.on(balancing_over="micro_batch", micro_sequences=4)
    assert_same(pool, one_process(run), run.on(**changes))


def test_the_loss_of_a_micro_batch_is_that_of_megatron_core() -> None:
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 3, 8, generator=generator, requires_grad=True)
    scores = logits.softmax(dim=-1)
    chosen = torch.zeros(18, 8, dtype=torch.bool).scatter(1, logits.detach().flatten(0, 1).topk(2).indices, True)
    theirs = switch_load_balancing_loss_func(scores.flatten(0, 1), chosen.sum(dim=0), 18, 2, 8, 0.1)
    expected = torch.autograd.grad(theirs * 18, logits, retain_graph=True)[0]
    clock = BalancingClock()
    clock.announce(torch.initial_seed(), torch.ones(3, 6, dtype=torch.long))  # every position counts and has a label
    balance = Balance(0.1, Positions(clock, SequenceCut(1, 0)), over="micro_batch")
    attached = balance(scores, chosen, torch.zeros(1, requires_grad=True))
    found = torch.autograd.grad(attached.sum(), logits)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("factor", [0.75, 1.5])
def test_experts_drop_the_lightest_tokens_beyond_their_capacity(
    pool: Pool, tiny_model: Callable[..., Path], factor: float
) -> None:
    """And the balancing loss is of what was chosen, not of what was kept."""
    folder = tiny_model("qwen3_moe")
    run = RUN.on(steps=3, capacity_factor=factor, micro_sequences=4)
    losses, tensors = train_with_transformers(run, folder)
    found, _, state = pool.run(1, runs.train, run, str(folder))[0]
    assert found == pytest.approx(losses, rel=LOSS_RTOL)
    learned = {name: value for name, value in weights([state]).items() if name in tensors}
    assert distance(learned, tensors) <= TENSOR_RTOL
    dropless = pool.run(1, runs.train, run.on(capacity_factor=None), str(folder))[0][0]
    assert dropless[0] != pytest.approx(losses[0], rel=5 * LOSS_RTOL)


def test_ranks_of_experts_drop_what_one_process_drops(pool: Pool, one_process: Callable[[Run], Outcome]) -> None:
    """Where each rank routes whole micro-batches, and these are the same."""
    run = RUN.on(capacity_factor=0.75, micro_sequences=1)
    assert_same(pool, one_process(run), run.on(**TOPOLOGIES["ep2-pp2"]))
