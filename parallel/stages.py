"""Stages: which layers run on which pipeline stage, and how megatron-core is told so.

A pipeline of ``pp`` stages with ``vpp`` virtual chunks each runs ``pp * vpp`` chunks in order; chunk ``c`` lives on
stage ``c % pp``. The embedding belongs to the first chunk, the final norm, output head and loss to the last.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache


class StageError(ValueError):
    """Layers that cannot be split as asked; ``hint`` says what to set."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@lru_cache(maxsize=256)
def split_layers(
    layers: int, pp: int, vpp: int | None = None, embedding_cost: float = 0.0, head_cost: float = 0.0
) -> tuple[tuple[int, ...], ...]:
    """Split ``layers`` equal layers into the chunks of a pipeline.

    Evenly where ``pp * vpp`` divides the layers (as megatron-core does by default). Elsewhere so that the most loaded
    chunk has the least to do, where the embedding and the head count as ``embedding_cost`` and ``head_cost`` layers;
    between equal splits the later chunks get more, for they hold fewer micro-batches.

    Returns:
        Layer indices of each chunk, in the order of the layers: chunk ``virtual * pp + stage``.
    Raises:
        StageError: there are fewer layers than chunks.
    Example:
        >>> split_layers(6, pp=3)
        ((0, 1), (2, 3), (4, 5))
        >>> split_layers(7, pp=3, head_cost=1.5)
        ((0, 1, 2), (3, 4, 5), (6,))
    """
    chunks = pp * (vpp or 1)
    if layers < chunks:
        virtual = f" x topology.vpp={vpp}" if vpp else ""
        raise StageError(
            f"model has {layers} layers, too few for topology.pp={pp}{virtual} = {chunks} chunks",
            f"topology.pp={layers} topology.vpp=null",
        )
    if layers % chunks == 0:
        return _ranges([layers // chunks] * chunks)
    return _ranges(_balanced_counts(layers, chunks, embedding_cost, head_cost))


def _balanced_counts(layers: int, chunks: int, embedding_cost: float, head_cost: float) -> list[int]:
    """Layers per chunk: one each, then every further one to the chunk that it loads least.

    Layers are equal and only their counts matter, so this greedy choice makes the smallest possible largest load.
    """
    counts = [1] * chunks
    extra = [0.0] * chunks
    extra[0] += embedding_cost
    extra[-1] += head_cost
    loads = [(1 + extra[chunk], -chunk) for chunk in range(chunks)]
    heapq.heapify(loads)
    for _ in range(layers - chunks):
        chunk = -loads[0][1]
        counts[chunk] += 1
        heapq.heapreplace(loads, (counts[chunk] + extra[chunk], -chunk))
    return counts


def _ranges(counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    def cut() -> Iterator[tuple[int, ...]]:
        start = 0
        for count in counts:
            yield tuple(range(start, start + count))
            start += count

    return tuple(cut())


def stage_layers(stages: Sequence[Sequence[int]], pp: int, stage: int) -> tuple[int, ...]:
    """All layers of one pipeline stage, over its virtual chunks.

    Example:
        >>> stage_layers(split_layers(8, pp=2, vpp=2), pp=2, stage=1)
        (2, 3, 6, 7)
    """
    return tuple(layer for chunk in stages[stage::pp] for layer in chunk)


def is_even(stages: Sequence[Sequence[int]]) -> bool:
    """Whether all chunks have as many layers, so that megatron-core needs no layout."""
    return len({len(chunk) for chunk in stages}) == 1


def megatron_layout(stages: Sequence[Sequence[int]]) -> list[list[str]]:
    """The same split as megatron-core's ``pipeline_model_parallel_layout``.

    Example:
        >>> megatron_layout(split_layers(3, pp=2, head_cost=1))
        [['embedding', 'decoder', 'decoder'], ['decoder', 'loss']]
    """
    layout = [["decoder"] * len(chunk) for chunk in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
