"""Process groups as a value: opened once for a topology, passed on, closed at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from parallel.topology import Topology

# What megatron-core calls its groups -> the axes that vary inside one of ours.
AXES = {  # a list of ranks has the first name that means it
    "tp": "tp",
    "pp": "pp",
    "cp": "cp",
    "dp": "dp",
    "mp": "tp-pp",
    "dp_cp": "dp-cp",
    "tp_cp": "tp-cp",
    "tp_dp_cp": "tp-dp-cp",
    "ep": "ep",
    "expt_tp": "etp",
    "tp_ep": "etp-ep",
    "tp_ep_pp": "etp-ep-pp",
    "expt_dp": "edp",
    "world": "tp-dp-cp-pp",
}


@dataclass(frozen=True)
class Groups:
    """The groups that this rank is in, by megatron-core's names, and where the rank stands in the topology.

    ``embd`` joins the first and last pipeline stage (their tied embeddings), None where there is nothing to tie.
    """

    topology: Topology
    rank: int
    by_name: Mapping[str, dist.ProcessGroup]
    embd: dist.ProcessGroup | None = None
    _opened: tuple[dist.ProcessGroup, ...] = field(default=(), repr=False)

    def coordinate(self, axis: str) -> int:
        """This rank's index along one dense axis."""
        return self.topology.coordinates(self.rank)[axis]

    def index(self, name: str) -> int:
        """This rank's index inside a group."""
        return dist.get_rank(self.by_name[name])

    def size(self, name: str) -> int:
        """How many ranks a group has."""
        return dist.get_world_size(self.by_name[name])

    def close(self) -> None:
        """Destroy the groups."""
        for group in self._opened:
            dist.destroy_process_group(group)


def open_groups(topology: Topology, rank: int) -> Groups:
    """Open every group that ``rank`` is in; collective over the ranks of the topology.

    Only members open a group (``use_local_synchronization``), each list of ranks once, so that the cost does not grow
    with the number of ranks. A group of one rank is opened too: megatron-core asks it for its size.
    """
    cache: dict[tuple[int, ...], Any] = {}

    def open_one(ranks: tuple[int, ...], name: str) -> dist.ProcessGroup:
        if ranks not in cache:
            cache[ranks] = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=name)
        return cache[ranks]

    by_name = {name: open_one(_mine(topology.groups(axes), rank), name) for name, axes in AXES.items()}
    stages = _mine(topology.groups("pp"), rank)
    ends = (stages[0], stages[-1])
    embd = open_one(ends, "embd") if topology.pp > 1 and rank in ends else None
    return Groups(topology, rank, by_name, embd, tuple(cache.values()))


def _mine(groups: list[tuple[int, ...]], rank: int) -> tuple[int, ...]:
    return next(group for group in groups if rank in group)
