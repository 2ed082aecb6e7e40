"""The coverage proof: every element of every logical tensor is held, and by equal boxes only. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.errors import IsotrainError
from parallel.shards import Box


class CoverageError(IsotrainError):
    """The ranks' shards do not make whole tensors: a fault of the engine, not of the user (70)."""


@dataclass(frozen=True)
class Held:
    """A box of a logical tensor and the ranks that hold it (replicas), ascending."""

    box: Box
    ranks: tuple[int, ...]


Holdings = Mapping[LogicalTensor, tuple[Held, ...]]


def prove(held_by_rank: Sequence[Iterable[tuple[LogicalTensor, Box]]]) -> Holdings:
    """Prove that each element of each tensor is covered exactly once, apart from replicas of equal boxes.

    Args:
        held_by_rank: for each rank the boxes it holds. Empty boxes count for nothing.
    Returns:
        Every tensor with its distinct boxes, sorted.
    Raises:
        CoverageError: ranks disagree about a tensor's shape or type, a box lies outside, unequal boxes overlap, or a
            range is held by no rank. The message names the tensor, the range and the ranks.
    Example:
        >>> tensor = LogicalTensor("w", "weight", (2, 2), "F32")
        >>> prove([[(tensor, Box((0, 0), (2, 2)))], [(tensor, Box((0, 0), (2, 2)))]])[tensor]
        (Held(box=Box(offset=(0, 0), size=(2, 2)), ranks=(0, 1)),)
    """
    ranks_of: dict[LogicalTensor, dict[Box, set[int]]] = {}
    first: dict[tuple[str, str], tuple[LogicalTensor, int]] = {}
    for rank, pieces in enumerate(held_by_rank):
        for tensor, box in pieces:
            known, by = first.setdefault((tensor.name, tensor.kind), (tensor, rank))
            if known != tensor:
                raise CoverageError(
                    f"{_title(tensor)}: rank {by} says shape {known.shape} {known.dtype}, "
                    f"rank {rank} says shape {tensor.shape} {tensor.dtype}"
                )
            boxes = ranks_of.setdefault(tensor, {})
            if box.elements:
                boxes.setdefault(box, set()).add(rank)
    proven = {}
    for tensor, boxes in ranks_of.items():
        held = tuple(Held(box, tuple(sorted(boxes[box]))) for box in sorted(boxes))
        _prove_tensor(tensor, held)
        proven[tensor] = held
    return proven


def _prove_tensor(tensor: LogicalTensor, held: Sequence[Held]) -> None:
    whole = Box.whole(tensor.shape)
    for item in held:
        inside = len(item.box.size) == len(tensor.shape) and item.box.intersect(whole) == item.box
        if not inside:
            raise CoverageError(f"{_title(tensor)}: {_range(item.box)} on rank {item.ranks[0]} lies outside")
    for position, one in enumerate(held):
        for other in held[position + 1 :]:
            if one.box.offset and other.box.offset[0] >= one.box.offset[0] + one.box.size[0]:
                break  # sorted by the first offset: no later box can overlap
            common = one.box.intersect(other.box)
            if common is not None:
                raise CoverageError(
                    f"{_title(tensor)}: {_range(one.box)} on rank {one.ranks[0]} and {_range(other.box)} on rank "
                    f"{other.ranks[0]} overlap in {_range(common)} without being equal"
                )
    covered = sum(item.box.elements for item in held)
    if covered != whole.elements:
        hole = _first_hole(whole, [item.box for item in held])
        raise CoverageError(
            f"{_title(tensor)}: {_range(hole)} is held by no rank ({covered} of {whole.elements} elements are)"
        )


def _first_hole(whole: Box, boxes: Iterable[Box]) -> Box:
    left = [whole]
    for box in boxes:
        left = [rest for part in left for rest in _without(part, box)]
    return min(left)


def _without(part: Box, cut: Box) -> list[Box]:
    """What remains of ``part`` when ``cut`` is taken away, as disjoint boxes."""
    common = part.intersect(cut)
    if common is None:
        return [part]
    rest = []
    offset, size = list(part.offset), list(part.size)
    for axis in range(len(size)):
        before = common.offset[axis] - offset[axis]
        after = offset[axis] + size[axis] - common.offset[axis] - common.size[axis]
        for start, count in ((offset[axis], before), (common.offset[axis] + common.size[axis], after)):
            if count:
                at, extent = [*offset], [*size]
                at[axis], extent[axis] = start, count
                rest.append(Box(tuple(at), tuple(extent)))
        offset[axis], size[axis] = common.offset[axis], common.size[axis]
    return rest


def _title(tensor: LogicalTensor) -> str:
    return f"checkpoint coverage of {tensor.name} ({tensor.kind}, shape {tensor.shape})"


def _range(box: Box) -> str:
    return "[" + ", ".join(f"{at}:{at + count}" for at, count in zip(box.offset, box.size, strict=True)) + "]"
