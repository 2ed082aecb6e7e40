"""Faults of context parallelism, planted on purpose: each must turn a comparison red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch

from parallel import attention_blocks, context_attention, seeding, sequence
from parallel.sequence import in_order
from parallel.topology import Topology
from tests.distributed.test_parity import assert_same
from tests.helpers import runs
from tests.helpers.attention import Case, attend_on_a_rank, whole_results
from tests.helpers.pool import Pool, RankError
from tests.helpers.runs import Run

RUN = Run(steps=1, tokens=16)
CASE = Case(heads=4, groups=2)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("cp", [2, 4])
def test_neither_loss_nor_gradient_grows_with_cp(pool: Pool, cp: int, full: bool) -> None:
    """Fault 9 of the design: Adam hides a scaled gradient, its norm and its first moment do not."""
    run = RUN.on(full=full)
    whole, cut = pool.run(1, runs.train, run)[0], pool.run(cp, runs.train, run.on(topology=Topology(cp=cp)))
    expected, found = runs.merge([whole[2]]), runs.merge([state for _, _, state in cut])
    for losses, norms, _ in cut:
        assert losses == pytest.approx(whole[0], rel=1e-5) and norms == pytest.approx(whole[1], rel=1e-4)
    moments = [key for key in expected if key[1] == "exp_avg"]
    assert moments
    for key in moments:
        difference = torch.linalg.vector_norm(found[key] - expected[key])
        assert difference <= 1e-4 * torch.linalg.vector_norm(expected[key]), key


def mean_of_blocks(patch: MonkeyPatch) -> None:
    patch.setattr(context_attention, "merge", lambda out, lse, part, part_lse: out.add_(part).mul_(0.5))


def log_sum_exp_of_one_block(patch: MonkeyPatch) -> None:
    """Blocks are merged right, but the backward pass (and a third block) sees the first one's log-sum-exp."""
    merge = attention_blocks.merge
    patch.setattr(context_attention, "merge", lambda out, lse, *part: merge(out, lse.clone(), *part))


def newer_keys_are_seen(patch: MonkeyPatch) -> None:
    visible = context_attention._visible

    def all_queries(rank: int, source: int, chunk: int) -> tuple[slice, slice, bool]:
        return (slice(None), slice(None), False) if source > rank else visible(rank, source, chunk)

    patch.setattr(context_attention, "_visible", all_queries)


def chunks_in_the_wrong_order(patch: MonkeyPatch) -> None:
    """A rank's late chunk before its early one: tokens, labels and positions agree, causality does not."""
    take = sequence.SequenceCut.take

    def late_first(cut: sequence.SequenceCut, whole: torch.Tensor, dim: int) -> torch.Tensor:
        mine = take(cut, whole, dim)
        return mine.roll(mine.shape[dim] // 2, dim)

    patch.setattr(sequence.SequenceCut, "take", late_first)


def plain_chunks(patch: MonkeyPatch) -> None:
    """Rank i holds the i-th part of the row, as without balancing."""
    patch.setattr(
        sequence.SequenceCut, "take", lambda cut, whole, dim: whole.chunk(cut.size, dim)[cut.rank].contiguous()
    )


def gradients_times_cp(patch: MonkeyPatch) -> None:
    from parallel.engines.megatron import MegatronEngine

    loss = MegatronEngine._loss

    def scaled(engine: Any, batch: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total, tokens, logged = loss(engine, batch, hidden)
        return total * engine._groups.topology.cp, tokens, logged

    patch.setattr(MegatronEngine, "_loss", scaled)


def mean_over_each_ranks_own_labels(patch: MonkeyPatch) -> None:
    """The mean of the ranks' means instead of the mean over all labels."""
    from parallel.engines.megatron import MegatronEngine

    loss = MegatronEngine._loss

    def normalised(engine: Any, batch: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total, tokens, _ = loss(engine, batch, hidden)
        total = total / tokens.clamp(min=1)
        one = torch.ones_like(tokens)
        return total, one, torch.stack([total.detach().double(), one.double()])

    patch.setattr(MegatronEngine, "_loss", normalised)


def masks_of_the_first_tokens(patch: MonkeyPatch) -> None:
    """Every rank drops out as if its tokens began the row."""
    made = seeding.DropoutClock.__init__
    patch.setattr(seeding.DropoutClock, "__init__", lambda clock, seed, width, cut: made(clock, seed, width))


def no_fault(_: MonkeyPatch) -> None:
    """What is right, for comparison."""


def attend_with(plant: Callable[[MonkeyPatch], None], case: Case, kind: str, cp: int) -> list[Any]:
    with MonkeyPatch.context() as patch:
        plant(patch)
        return attend_on_a_rank([case], kind, cp)[0]


def train_with(
    plant: Callable[[MonkeyPatch], None], run: Run, base_folder: None = None
) -> tuple[list[float], list[float], list[tuple[Any, ...]]]:
    with MonkeyPatch.context() as patch:
        plant(patch)
        return runs.train(run)


def worst_errors(ranks: list[list[Any]]) -> list[float]:
    """Relative errors of output, dq, dk and dv."""
    errors = []
    for expected, *parts in zip(whole_results(CASE), *ranks, strict=True):
        whole = in_order(torch.stack([torch.from_numpy(each) for each in parts]))
        errors.append(float(torch.linalg.vector_norm(whole - expected) / torch.linalg.vector_norm(expected)))
    return errors


@pytest.mark.parametrize("plant", [mean_of_blocks, log_sum_exp_of_one_block, newer_keys_are_seen])
def test_a_wrong_merge_or_a_wrong_block_shows_in_the_attention(
    pool: Pool, plant: Callable[[MonkeyPatch], None]
) -> None:
    assert max(worst_errors(pool.run(3, attend_with, no_fault, CASE, "ring", 3))) < 1e-5
    assert max(worst_errors(pool.run(3, attend_with, plant, CASE, "ring", 3))) > 1e-2


@pytest.mark.parametrize(
    "plant",
    [
        chunks_in_the_wrong_order,
        plain_chunks,
        gradients_times_cp,
        mean_over_each_ranks_own_labels,
        masks_of_the_first_tokens,
    ],
)
def test_a_fault_of_the_engine_shows_in_the_run(pool: Pool, plant: Callable[[MonkeyPatch], None]) -> None:
    run = RUN.on(dropout=0.3)

    class Planted:
        """The pool, where runs on several ranks have the fault."""

        def run(self, world: int, function: Any, *args: Any) -> list[Any]:
            return pool.run(world, train_with, plant, *args) if world > 1 else pool.run(world, function, *args)

    with pytest.raises(AssertionError) as caught:
        assert_same(Planted(), run, run.on(topology=Topology(cp=2)))  # type: ignore[arg-type]
    assert not isinstance(caught.value, RankError), caught.value
