"""Ranks that hold the same weights share out work that each would do alike, and have the same bits of its outcome."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.groups import Groups


@dataclass(frozen=True)
class Team:
    """The ranks that hold the same weights: ``cut`` those with the parts of one, ``replicas`` those with one part.

    They take turns, :attr:`size` of them.
    """

    cut: dist.ProcessGroup
    replicas: dist.ProcessGroup

    @property
    def size(self) -> int:
        """How many ranks these are."""
        return dist.get_world_size(self.cut) * dist.get_world_size(self.replicas)

    def is_mine(self, turn: int) -> bool:
        """Whether this turn is this rank's."""
        return self.in_my_row(turn) and dist.get_rank(self.cut) == turn % dist.get_world_size(self.cut)

    def in_my_row(self, turn: int) -> bool:
        """Whether the rank whose turn it is gathers from this rank's group."""
        return dist.get_rank(self.replicas) == turn // dist.get_world_size(self.cut)

    def share(self, tensor: torch.Tensor, turn: int) -> None:
        """Give everybody the tensor of the rank whose turn it is."""
        row, column = divmod(turn, dist.get_world_size(self.cut))
        if self.in_my_row(turn):
            dist.broadcast(tensor, dist.get_global_rank(self.cut, column), self.cut)
        dist.broadcast(tensor, dist.get_global_rank(self.replicas, row), self.replicas)


def team_of(groups: Groups, is_expert: bool) -> Team:
    """The team of this rank's dense weights, or of its experts'."""
    cut, replicas = ("expt_tp", "expt_dp") if is_expert else ("tp", "dp_cp")
    return Team(groups.by_name[cut], groups.by_name[replicas])
