"""Cut rows: every token sits on one rank, work is even, and nothing is lost on the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.seeding import DropoutClock
from parallel.sequence import SequenceCut, SequenceError, by_rank, in_order

SIZES = st.integers(1, 6)


@given(cp=SIZES, chunk=st.integers(1, 5))
def test_the_ranks_hold_every_token_once_and_equally_many_older_ones(cp: int, chunk: int) -> None:
    row = torch.arange(2 * cp * chunk)
    parts = [SequenceCut(cp, rank).take(row, 0) for rank in range(cp)]
    assert sorted(torch.cat(parts).tolist()) == row.tolist()
    assert len({int((part + 1).sum()) for part in parts}) == 1  # keys that a rank's queries see: even causal work
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert torch.equal(in_order(torch.stack(parts)), row)
    assert torch.equal(by_rank(row, cp), torch.stack(parts))


def test_any_dimension_is_cut() -> None:
    rows = torch.arange(24).view(2, 12)
    assert SequenceCut(3, 1).take(rows, 1).tolist() == [[2, 3, 8, 9], [14, 15, 20, 21]]
    assert SequenceCut().take(rows, 1) is rows


def test_a_whole_row_of_odd_length_needs_no_order() -> None:
    assert in_order(torch.arange(3)[None]).tolist() == [0, 1, 2]


def test_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(SequenceError, match="rows of 10 tokens cannot be cut into 2 x cp = 4 chunks") as caught:
        SequenceCut(2, 0).take(torch.zeros(1, 10), 1)
    assert caught.value.hint == "pad rows to a multiple of 4 tokens"


@pytest.mark.parametrize("cp", [2, 3])
def test_masks_of_cut_rows_are_cut_out_of_the_samples_masks(cp: int) -> None:
    """Also when the longest row of the run is padded to another multiple there."""

    def mask(cut: SequenceCut, width: int) -> torch.Tensor:
        clock = DropoutClock(5, width, cut)
        clock.begin_step()
        clock.announce(0, (7, 9))
        return clock.mask("m", 12 // cut.size, 4, 0.5)

    whole = mask(SequenceCut(), 17)
    parts = torch.stack([mask(SequenceCut(cp, rank), 24) for rank in range(cp)])
    assert torch.equal(in_order(parts), whole)
    assert 0.2 < whole.float().mean() < 0.8
