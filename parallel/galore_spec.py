"""What GaLore is asked for, as a value: which side of a matrix is projected, and how large its state is. No torch."""

from __future__ import annotations

from dataclasses import dataclass

PROJECTIONS = ("std", "reverse_std", "left", "right")


@dataclass(frozen=True)
class GaloreSpec:
    """Adam on projected gradients (Zhao et al. 2024, arXiv:2403.03507); defaults of its reference implementation.

    ``rank``: dimensions that a gradient is projected to, at most the shorter side of its matrix. ``update_steps``:
    every so many steps the subspace is chosen anew (the paper's T). ``scale``: factor of the projected-back update
    (its alpha). ``projection``: ``std`` projects the shorter side, ``reverse_std`` the longer one, ``left`` the rows,
    ``right`` the columns; of a square matrix ``std`` takes the columns.
    """

    rank: int = 128
    update_steps: int = 200
    scale: float = 0.25
    projection: str = "std"

    def axis(self, shape: tuple[int, int]) -> int:
        """The axis of a matrix ``[out, in]`` that is projected: 0 for its rows, 1 for its columns.

        Example:
            >>> GaloreSpec().axis((8, 24)), GaloreSpec().axis((24, 8)), GaloreSpec(projection="left").axis((24, 8))
            (0, 1, 0)
        """
        shorter = 0 if shape[0] < shape[1] else 1
        return {"std": shorter, "reverse_std": 1 - shorter, "left": 0, "right": 1}[self.projection]

    def shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of a matrix's projector ``[projected side, rank]`` and of each moment ``[rank, other side]``.

        Example:
            >>> GaloreSpec(rank=4).shapes((8, 24)), GaloreSpec(rank=4).shapes((24, 8))
            (((8, 4), (4, 24)), ((8, 4), (4, 24)))
        """
        axis, rank = self.axis(shape), min(self.rank, *shape)
        return (shape[axis], rank), (rank, shape[1 - axis])
