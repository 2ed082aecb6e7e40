"""Which rows a step takes, and how they are dealt to data-parallel ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from orchestrator.data.store import TokenisedData
from orchestrator.errors import ConfigError
from parallel.engine import IGNORED_LABEL, NO_SAMPLE, MicroBatch

SHORTEST_ROW = 2  # tokens: one and the next


class SampleOrder:
    """An endless order of rows: every epoch is a permutation that depends on the seed and the epoch alone.

    Position ``p`` of a run lies in epoch ``p // rows``. The order is the same on every topology, and also with every
    version of numpy: the raw stream of a bit generator never changes, while that of ``permutation`` may (NEP 19).

    Example:
        >>> order = SampleOrder(rows=3, seed=0)
        >>> sorted(order.rows_at(0, 3).tolist()), sorted(order.rows_at(3, 3).tolist())
        ([0, 1, 2], [0, 1, 2])
    """

    def __init__(self, rows: int, seed: int) -> None:
        """Raises ConfigError for a negative seed; there must be a row."""
        if seed < 0:
            raise ConfigError(f"seed={seed} is negative", f"seed={-seed}")
        assert rows > 0, "an order of no rows"
        self.rows, self.seed = rows, seed
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def rows_at(self, position: int, count: int) -> np.ndarray:
        """The rows at positions ``position .. position + count``: int64 ``[count]``."""
        parts, end = [], position + count
        while position < end:
            epoch, start = divmod(position, self.rows)
            part = self._rows_of_epoch(epoch)[start : start + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _rows_of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            stream = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
            self._permutation = np.argsort(stream.random_raw(self.rows), kind="stable").astype(np.int64)
            self._epoch = epoch
        return self._permutation


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut.

    Args:
        dp: data-parallel ranks.
        micro_batches: per dp rank and step.
        micro_sequences: rows per micro-batch.
        length_multiple: tokens per row are padded to a multiple of it.
        common_length: all micro-batches of a dp rank's step have one length (a pipeline needs it).
        empty: micro-batches that have no rows, where dp does not divide the batch: the last of some ranks.
    """

    dp: int = 1
    micro_batches: int = 1
    micro_sequences: int = 1
    length_multiple: int = 1
    common_length: bool = False
    empty: int = 0

    @property
    def global_sequences(self) -> int:
        """Rows per optimizer step over all dp ranks."""
        return (self.dp * self.micro_batches - self.empty) * self.micro_sequences


def step_microbatches(
    data: TokenisedData, order: SampleOrder, first: int, shape: BatchShape, dp_rank: int
) -> list[MicroBatch]:
    """The micro-batches of one data-parallel rank for the step that begins at position ``first``, longest first.

    The step takes positions ``first .. first + G`` of the order, with ``G = shape.global_sequences``, whatever the
    layout. Rows of similar length share a micro-batch, and ranks get about the same number of tokens.

    Returns:
        ``shape.micro_batches`` micro-batches of ``shape.micro_sequences`` rows; ``sample_ids`` are positions. Ranks
        that were dealt fewer run one of padding alone, so that all take part in every collective.
    """
    if not 0 <= dp_rank < shape.dp:
        raise ValueError(f"dp_rank {dp_rank} is not below dp {shape.dp}")
    rows = order.rows_at(first, shape.global_sequences)
    lengths = data.lengths(rows)
    groups = deal(lengths, shape)[dp_rank]
    tokens = [padded_tokens(lengths[group].max(), shape.length_multiple) for group in groups]
    if shape.common_length:
        tokens = [max(tokens)] * len(tokens)
    dealt = [
        _micro_batch(data, ((first + int(index), int(rows[index])) for index in group), (len(group), width))
        for group, width in zip(groups, tokens, strict=True)
    ]
    width = tokens[-1] if shape.common_length else padded_tokens(SHORTEST_ROW, shape.length_multiple)
    return dealt + [_without_rows(data, (shape.micro_sequences, width))] * (shape.micro_batches - len(dealt))


def padded_tokens(length: int, multiple: int) -> int:
    """The next multiple.

    Example:
        >>> padded_tokens(9, 4), padded_tokens(8, 4)
        (12, 8)
    """
    return -(-int(length) // multiple) * multiple


def deal(lengths: np.ndarray, shape: BatchShape) -> list[list[np.ndarray]]:
    """Deal the rows of a global batch to ranks and micro-batches.

    Rows sorted by length (ties by position) are cut into micro-batches. These are dealt from the longest on, ``dp`` at
    a time, the longer ones to the ranks that have the least so far. So two ranks never differ by more padded tokens
    than the longest and the shortest micro-batch do; where dp does not divide them, than the longest one has.

    Args:
        lengths: tokens of each row, ``[shape.global_sequences]``.
    Returns:
        for every dp rank its micro-batches that have rows, each an array of ``shape.micro_sequences`` indices into
        ``lengths``.
    Example:
        >>> hands = deal(np.array([5, 1, 7, 3]), BatchShape(dp=2, micro_batches=2))
        >>> [[group.tolist() for group in hand] for hand in hands]
        [[[2], [1]], [[0], [3]]]
    """
    by_length = np.argsort(-lengths, kind="stable")
    hands: list[list[np.ndarray]] = [[] for _ in range(shape.dp)]
    loads = [0] * shape.dp
    groups = by_length.reshape(-1, shape.micro_sequences)
    for start in range(0, len(groups), shape.dp):
        lightest_first = sorted(range(shape.dp), key=lambda rank: (loads[rank], rank))
        for rank, group in zip(lightest_first, groups[start : start + shape.dp], strict=False):
            hands[rank].append(group)
            loads[rank] += padded_tokens(lengths[group].max(), shape.length_multiple) * shape.micro_sequences
    return hands


def _micro_batch(data: TokenisedData, samples: Iterable[tuple[int, int]], size: tuple[int, int]) -> MicroBatch:
    """Pad (position, row) samples to ``size`` = (sequences, tokens) and shift the labels by one."""
    import torch

    tokens = np.full(size, data.summary.pad_token, np.int64)
    labels = np.full(size, IGNORED_LABEL, np.int64)
    positions = []
    for place, (position, row) in enumerate(samples):
        row_tokens, learned = data.row(row)
        positions.append(position)
        tokens[place, : len(row_tokens)] = row_tokens
        labels[place, : len(row_tokens) - 1] = np.where(learned[1:], row_tokens[1:], IGNORED_LABEL)
    return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(labels), tuple(positions))


def _without_rows(data: TokenisedData, size: tuple[int, int]) -> MicroBatch:
    """Padding of ``size`` = (sequences, tokens), of which nothing is learned."""
    import torch

    tokens = torch.full(size, data.summary.pad_token, dtype=torch.int64)
    return MicroBatch(tokens, torch.full_like(tokens, IGNORED_LABEL), (NO_SAMPLE,) * size[0])
