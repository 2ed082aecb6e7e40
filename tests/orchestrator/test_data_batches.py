"""Order and batches: the same rows and labels per step on every layout, each exactly once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import BatchShape, DataSummary, SampleOrder, TokenisedData, step_microbatches
from orchestrator.data.batches import deal, padded_tokens
from orchestrator.errors import ConfigError
from parallel.engine import IGNORED_LABEL, NO_SAMPLE, MicroBatch

PAD = 999_999


def made(lengths: list[int], seed: int = 0) -> TokenisedData:
    """Rows of these lengths; row r, token t holds r * 1000 + t, so that every label tells where it is from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([np.arange(length) + 1000 * row for row, length in enumerate(lengths)]).astype(np.int32)
    learned = np.random.default_rng(seed).random(len(tokens)) < 0.5
    learned[offsets[1:] - 1] = True
    summary = DataSummary("", "", "", len(lengths), len(tokens), 0, max(lengths), 0, max(lengths), PAD)
    return TokenisedData(tokens, learned, offsets, summary)


@st.composite
def shapes(draw: st.DrawFn, rows: int) -> BatchShape:
    """A cut of ``rows``, also by a dp that does not divide them."""
    micro = draw(st.sampled_from([size for size in (1, 2, 3) if rows % size == 0]))
    dp = draw(st.integers(1, min(4, rows // micro)))
    count = -(-rows // micro // dp)
    empty = dp * count - rows // micro
    return BatchShape(dp, count, micro, draw(st.sampled_from([1, 2, 6, 8])), draw(st.booleans()), empty)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], BatchShape, BatchShape, int]:
    """Row lengths, two shapes of the same global batch, and a step."""
    factors = st.sampled_from([1, 2, 3])
    rows = draw(factors) * draw(factors) * draw(st.integers(1, 5))
    first, second = draw(shapes(rows)), draw(shapes(rows))
    lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=50))
    return lengths, first, second, draw(st.integers(0, 12))


def whole_step(data: TokenisedData, shape: BatchShape, step: int, seed: int = 3) -> list[list[MicroBatch]]:
    order = SampleOrder(data.rows, seed)
    return [step_microbatches(data, order, step * shape.global_sequences, shape, rank) for rank in range(shape.dp)]


def labels_by_sample(ranks: list[list[MicroBatch]]) -> dict[int, list[int]]:
    """Position in the run -> its label tokens, in order. Fails on a position that is there twice."""
    found: dict[int, list[int]] = {}
    for micro in (micro for rank in ranks for micro in rank):
        for position, labels in zip(micro.sample_ids, micro.labels.tolist(), strict=True):
            if position == NO_SAMPLE:
                assert set(labels) == {IGNORED_LABEL}
                continue
            assert position not in found
            found[position] = [label for label in labels if label != IGNORED_LABEL]
    return found


@settings(max_examples=150)
@given(layouts())
def test_a_step_has_the_same_samples_and_labels_on_every_layout(
    case: tuple[list[int], BatchShape, BatchShape, int],
) -> None:
    lengths, first, second, step = case
    data = made(lengths)
    one, two = (labels_by_sample(whole_step(data, shape, step)) for shape in (first, second))
    assert one == two
    size = first.global_sequences
    assert sorted(one) == list(range(step * size, (step + 1) * size))


@settings(max_examples=150)
@given(layouts())
def test_rows_are_whole_shifted_padded_and_of_the_shape_asked_for(
    case: tuple[list[int], BatchShape, BatchShape, int],
) -> None:
    lengths, shape, _, step = case
    data, order = made(lengths), SampleOrder(len(lengths), 3)
    for rank in whole_step(data, shape, step):
        assert len(rank) == shape.micro_batches
        widths = [micro.tokens.shape[1] for micro in rank]
        assert widths == sorted(widths, reverse=True)
        assert not shape.common_length or len(set(widths)) == 1
        for micro, width in zip(rank, widths, strict=True):
            assert micro.tokens.shape == micro.labels.shape == (shape.micro_sequences, width)
            assert str(micro.tokens.dtype) == str(micro.labels.dtype) == "torch.int64"
            assert width % shape.length_multiple == 0
            assert width <= padded_tokens(data.summary.sequence_tokens, shape.length_multiple)
            if micro.sample_ids[0] == NO_SAMPLE:
                assert set(micro.sample_ids) == {NO_SAMPLE} and bool((micro.tokens == PAD).all())
                continue
            longest = 0
            for index, position in enumerate(micro.sample_ids):
                tokens, learned = data.row(int(order.rows_at(position, 1)[0]))
                longest = max(longest, len(tokens))
                assert micro.tokens[index].tolist() == tokens.tolist() + [PAD] * (width - len(tokens))
                shifted = np.where(learned[1:], tokens[1:], IGNORED_LABEL).tolist()
                assert micro.labels[index].tolist() == shifted + [IGNORED_LABEL] * (width - len(tokens) + 1)
            assert shape.common_length or width == padded_tokens(longest, shape.length_multiple)


@settings(max_examples=150)
@given(layouts())
def test_rows_of_similar_length_share_and_ranks_are_balanced(
    case: tuple[list[int], BatchShape, BatchShape, int],
) -> None:
    lengths, shape, _, _ = case
    many = np.resize(np.asarray(lengths), shape.global_sequences)
    hands = deal(many, shape)
    groups = sorted((many[group] for hand in hands for group in hand), key=lambda group: (-group.max(), -group.min()))
    assert all(group.min() >= after.max() for group, after in pairwise(groups))
    padded = [padded_tokens(group.max(), shape.length_multiple) * shape.micro_sequences for group in groups]
    loads = [
        sum(padded_tokens(many[group].max(), shape.length_multiple) * shape.micro_sequences for group in hand)
        for hand in hands
    ]
    assert max(loads) - min(loads) <= max(padded) - (0 if shape.empty else min(padded))
    assert sum(shape.micro_batches - len(hand) for hand in hands) == shape.empty
    assert {len(hand) for hand in hands} <= {shape.micro_batches, shape.micro_batches - 1}


@given(rows=st.integers(1, 30), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
@settings(max_examples=50)
def test_every_epoch_takes_every_row_once(rows: int, seed: int, epoch: int) -> None:
    assert sorted(SampleOrder(rows, seed).rows_at(epoch * rows, rows).tolist()) == list(range(rows))


@given(rows=st.integers(1, 30), start=st.integers(0, 100), count=st.integers(0, 70), cut=st.integers(0, 70))
@settings(max_examples=50)
def test_the_order_does_not_depend_on_where_reading_starts(rows: int, start: int, count: int, cut: int) -> None:
    whole = SampleOrder(rows, 5).rows_at(start, count).tolist()
    order, cut = SampleOrder(rows, 5), min(cut, count)
    assert order.rows_at(start, cut).tolist() + order.rows_at(start + cut, count - cut).tolist() == whole


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(SampleOrder(20, seed).rows_at(epoch * 20, 20)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_is_the_one_that_older_checkpoints_were_made_with() -> None:
    assert SampleOrder(8, 0).rows_at(0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert SampleOrder(8, 7).rows_at(8, 8).tolist() == [7, 6, 1, 4, 3, 2, 5, 0]


def test_a_data_set_smaller_than_the_batch_wraps_into_the_next_epochs() -> None:
    data, shape = made([5, 6, 7]), BatchShape(dp=2, micro_batches=2, micro_sequences=2)
    labels = labels_by_sample(whole_step(data, shape, 0)).values()
    assert sorted(Counter(row[-1] // 1000 for row in labels).values()) == [2, 3, 3]


def test_a_hand_computed_micro_batch() -> None:
    tokens = np.asarray([11, 12, 13, 14, 21, 22], np.int32)
    learned = np.asarray([True, False, True, True, False, True])
    summary = DataSummary("", "", "", 2, 6, 3, 4, 0, 4, PAD)
    data = TokenisedData(tokens, learned, np.asarray([0, 4, 6]), summary)
    order = SampleOrder(2, 0)
    (micro,) = step_microbatches(data, order, 0, BatchShape(micro_sequences=2, length_multiple=3), 0)
    assert micro.tokens.tolist() == [[11, 12, 13, 14, PAD, PAD], [21, 22, PAD, PAD, PAD, PAD]]
    none = IGNORED_LABEL
    assert micro.labels.tolist() == [[none, 13, 14, none, none, none], [22, none, none, none, none, none]]
    assert order.rows_at(micro.sample_ids[0], 1).tolist() == [0]


def test_a_rank_that_is_not_there_and_a_negative_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="dp_rank 2 is not below dp 2"):
        step_microbatches(made([3]), SampleOrder(1, 0), 0, BatchShape(dp=2), 2)
    with pytest.raises(ConfigError, match="seed=-1 is negative") as caught:
        SampleOrder(4, -1)
    assert caught.value.hint == "seed=1"
