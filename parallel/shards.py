"""Shards: pieces of logical tensors, and the algebra that cuts and merges them. No torch is imported.

A *logical tensor* is named and shaped as in the Hugging Face / PEFT layout. A *box* is an axis-aligned piece of a
tensor. A *piece* says which box of a logical tensor lies in which box of a rank's local tensor. A *shard* is a piece
with its data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KINDS = ("weight", "exp_avg", "exp_avg_sq", "master", "projector")


@dataclass(frozen=True, order=True)
class Box:
    """An axis-aligned box: rows ``offset[d] .. offset[d] + size[d]`` of every dimension ``d``.

    Example:
        >>> Box((2, 0), (3, 4)).slices
        (slice(2, 5, None), slice(0, 4, None))
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of a tensor or a safetensors slice."""
        return tuple(slice(start, start + count) for start, count in zip(self.offset, self.size, strict=True))

    @property
    def elements(self) -> int:
        """How many elements lie in the box."""
        total = 1
        for count in self.size:
            total *= count
        return total

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    def intersect(self, other: Box) -> Box | None:
        """The common part of two boxes of one tensor; None when it is empty.

        Example:
            >>> Box((0, 0), (4, 4)).intersect(Box((2, 1), (4, 1)))
            Box(offset=(2, 1), size=(2, 1))
        """
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stop = tuple(
            min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True)
        )
        size = tuple(hi - lo for lo, hi in zip(start, stop, strict=True))
        return None if any(count <= 0 for count in size) else Box(start, size)

    def shift(self, by: tuple[int, ...]) -> Box:
        """The same box, moved."""
        return Box(tuple(a + b for a, b in zip(self.offset, by, strict=True)), self.size)


@dataclass(frozen=True)
class Piece:
    """Where a box of a logical tensor lies in a rank's local tensor.

    ``box`` is in coordinates of the logical tensor of ``shape``; ``local`` in those of the local tensor. Both boxes
    have one size. ``state_shape``: the shape of the optimizer's tensors of this name, where only the first rows or
    columns of the logical tensor are trained; None: ``shape``.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    local: Box
    state_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shard:
    """A box of a logical tensor with its data on this rank.

    ``data`` is a view of live training state with ``data.shape == box.size``; writing to it changes the state. Several
    ranks may hold the same box (replicas): their data are equal. ``kind`` is one of :data:`KINDS`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    box: Box
    data: torch.Tensor


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Cut the flat range ``[start, stop)`` of a row-major tensor into boxes.

    A distributed optimizer owns flat ranges that begin and end anywhere; a range of a matrix is at most three boxes.

    Returns:
        Boxes in flat order, each with the flat offset of its first element relative to ``start``.
    Example:
        >>> [box for box, _ in flat_boxes((4, 3), 2, 10)]
        [Box(offset=(0, 2), size=(1, 1)), Box(offset=(1, 0), size=(2, 3)), Box(offset=(3, 0), size=(1, 1))]
    """
    yield from _flat_boxes(shape, start, stop, start)


def _flat_boxes(shape: tuple[int, ...], start: int, stop: int, origin: int) -> Iterator[tuple[Box, int]]:
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape)), start - origin
        return
    row = 1
    for count in shape[1:]:
        row *= count
    first, last = start // row, (stop - 1) // row
    if first == last and (start, stop) != (first * row, first * row + row):
        base = first * row
        for box, at in _flat_boxes(shape[1:], start - base, stop - base, origin - base):
            yield Box((first, *box.offset), (1, *box.size)), at
        return
    whole_from = -(-start // row)
    whole_to = stop // row
    if start < whole_from * row:
        yield from _flat_boxes(shape, start, whole_from * row, origin)
    if whole_from < whole_to:
        size = (whole_to - whole_from, *shape[1:])
        yield Box((whole_from,) + (0,) * (len(shape) - 1), size), whole_from * row - origin
    if whole_to * row < stop:
        yield from _flat_boxes(shape, whole_to * row, stop, origin)
