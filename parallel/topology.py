"""Topology: the sizes of the parallel axes, and who sits where. Pure arithmetic: no torch, no process.

Ranks are numbered as megatron-core does by default (order "tp-cp-ep-dp-pp"): ``tp`` is the fastest axis, so that
tensor-parallel peers are neighbours on one node, and ``pp`` the slowest. Two grids lie over the same ranks:

- the dense grid ``tp x cp x dp x pp`` (fastest first), for attention, norms, embeddings and dense MLPs;
- the expert grid ``etp x ep x edp x pp``, for the experts of a mixture of experts: the ``tp * cp * dp`` ranks of a
  pipeline stage regrouped, with ``edp = tp * cp * dp / (etp * ep)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")


class TopologyError(ValueError):
    """Axis sizes, coordinates or names that make no grid; ``hint`` says what to set."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Topology:
    """Sizes of all axes.

    Raises:
        TopologyError: a size is no positive whole number, or ``ep * etp`` does not divide ``dp * cp * tp``.
    Example:
        >>> topology = Topology(pp=2, dp=2, tp=2)
        >>> topology.world_size, str(topology)
        (8, 'pp=2 dp=2 cp=1 tp=2')
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for axis in ("pp", "dp", "cp", "tp", "ep", "etp"):
            size = getattr(self, axis)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise TopologyError(f"topology.{axis}={size!r} is no positive whole number", f"topology.{axis}=1")
        if self.stage_ranks % (self.ep * self.etp):
            raise TopologyError(
                f"topology.ep={self.ep} x topology.etp={self.etp} = {self.ep * self.etp} does not divide the "
                f"{self.stage_ranks} ranks of a pipeline stage (dp={self.dp} cp={self.cp} tp={self.tp})",
                f"topology.ep={math.gcd(self.ep, self.stage_ranks)} topology.etp=1",
            )

    def __str__(self) -> str:
        experts = f" ep={self.ep} etp={self.etp}" if (self.ep, self.etp) != (1, 1) else ""
        return f"pp={self.pp} dp={self.dp} cp={self.cp} tp={self.tp}{experts}"

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: ``dp * cp * tp``."""
        return self.dp * self.cp * self.tp

    @property
    def world_size(self) -> int:
        """All ranks: ``pp * dp * cp * tp``."""
        return self.pp * self.stage_ranks

    @property
    def edp(self) -> int:
        """How many replicas of every expert shard there are: ``dp * cp * tp / (ep * etp)``."""
        return self.stage_ranks // (self.ep * self.etp)

    def size(self, axes: str) -> int:
        """How many ranks one group along ``axes`` has.

        Raises:
            TopologyError: as :meth:`groups`.
        Example:
            >>> Topology(dp=2, cp=2, tp=3).size("dp-cp")
            4
        """
        names, _ = _split(axes)
        return math.prod(int(getattr(self, axis)) for axis in names)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank sits in both grids.

        Returns:
            The index along each of tp, cp, dp, pp, etp, ep and edp, in this order.
        Raises:
            TopologyError: there is no such rank.
        Example:
            >>> Topology(pp=2, dp=2, tp=2, ep=2).coordinates(3)
            {'tp': 1, 'cp': 0, 'dp': 1, 'pp': 0, 'etp': 0, 'ep': 1, 'edp': 1}
        """
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank {rank} is not in 0..{self.world_size - 1} ({self})")
        found: dict[str, int] = {}
        for axis, stride in (*self._strides(DENSE_AXES), *self._strides(EXPERT_AXES)):
            found.setdefault(axis, rank // stride % int(getattr(self, axis)))
        return found

    def rank(self, **coordinates: int) -> int:
        """The rank at some coordinates of one grid; axes that are not given are 0.

        Raises:
            TopologyError: an unknown axis, an index out of range, or axes of both grids.
        Example:
            >>> topology = Topology(pp=2, dp=2, tp=2, ep=2)
            >>> topology.rank(pp=1, tp=1), topology.rank(pp=1, ep=1, edp=1)
            (5, 7)
        """
        names, grid = _split("-".join(coordinates)) if coordinates else ((), DENSE_AXES)
        for axis in names:
            if not 0 <= coordinates[axis] < getattr(self, axis):
                raise TopologyError(f"{axis}={coordinates[axis]} is not in 0..{getattr(self, axis) - 1} ({self})")
        return sum(coordinates.get(axis, 0) * stride for axis, stride in self._strides(grid))

    def groups(self, axes: str) -> list[tuple[int, ...]]:
        """List the rank groups along one axis or a hyphen-joined set of axes of one grid.

        Ranks in a group differ only in their coordinates along ``axes``. Every rank appears in exactly one group, and
        the list is the same on every rank, so it is safe to loop over when opening collectives.

        Args:
            axes: of the dense grid (tp, cp, dp, pp) or of the expert grid (etp, ep, edp, pp), in any order.
        Returns:
            ``world_size / size(axes)`` ascending tuples of global ranks, ordered by their first rank.
        Raises:
            TopologyError: an unknown axis, one named twice, or axes of both grids.
        Example:
            >>> Topology(dp=2, tp=2).groups("tp")
            [(0, 1), (2, 3)]
            >>> Topology(pp=2, dp=2).groups("dp-pp")
            [(0, 1, 2, 3)]
        """
        names, grid = _split(axes)
        inside = list(self._offsets(names, grid))
        return [tuple(start + offset for offset in inside) for start in self._offsets(set(grid) - set(names), grid)]

    def group(self, axes: str, rank: int) -> tuple[int, ...]:
        """The group of :meth:`groups` that ``rank`` is in.

        Raises:
            TopologyError: as :meth:`groups` and :meth:`coordinates`.
        Example:
            >>> Topology(dp=2, tp=2).group("dp", 3)
            (1, 3)
        """
        names, grid = _split(axes)
        here = self.coordinates(rank)
        start = rank - sum(here[axis] * stride for axis, stride in self._strides(grid) if axis in names)
        return tuple(start + offset for offset in self._offsets(names, grid))

    def _strides(self, grid: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        stride = 1
        for axis in grid:
            yield axis, stride
            stride *= int(getattr(self, axis))

    def _offsets(self, axes: Iterable[str], grid: tuple[str, ...]) -> Iterator[int]:
        """Ranks, ascending, whose coordinates along all other axes of the grid are 0."""
        wanted = set(axes)
        strides = [(axis, stride) for axis, stride in self._strides(grid) if axis in wanted]
        spans = [range(0, stride * int(getattr(self, axis)), stride) for axis, stride in reversed(strides)]
        return (sum(offsets) for offsets in product(*spans))


def _split(axes: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split a hyphen-joined set of axes and find the grid that it belongs to."""
    names = tuple(axes.split("-"))
    if len(set(names)) != len(names):
        raise TopologyError(f"axes {axes!r} name an axis twice")
    for grid in (DENSE_AXES, EXPERT_AXES):
        if set(names) <= set(grid):
            return names, grid
    unknown = set(names) - set(DENSE_AXES) - set(EXPERT_AXES)
    if unknown:
        raise TopologyError(f"unknown axis {min(unknown)!r} in {axes!r}; axes are tp, cp, dp, pp and etp, ep, edp")
    raise TopologyError(f"axes {axes!r} are of two grids: dense is tp-cp-dp-pp, experts are etp-ep-edp-pp")
