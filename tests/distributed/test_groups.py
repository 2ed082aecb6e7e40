"""Groups are those of the topology: every rank finds its peers in each, by what an all-reduce over it adds up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.topology import Topology
from tests.helpers.pool import Pool

TOPOLOGIES = [
    Topology(),
    Topology(pp=2, dp=2),
    Topology(tp=2, pp=2),
    Topology(tp=2, dp=2, ep=2),
    Topology(cp=2, tp=2, ep=2, etp=2),
]


def sums(topology: Topology) -> dict[str, Any]:
    from parallel.groups import open_groups

    groups = open_groups(topology, dist.get_rank())
    found: dict[str, Any] = {}
    for name, group in groups.by_name.items():
        value = torch.tensor(10 ** dist.get_rank())
        dist.all_reduce(value, group=group)
        found[name] = (int(value), groups.index(name), groups.size(name))
    found["embd"] = None if groups.embd is None else sorted(dist.get_process_group_ranks(groups.embd))
    found["stage"] = groups.coordinate("pp")
    groups.close()
    return found


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_groups_are_those_of_the_topology(pool: Pool, topology: Topology) -> None:
    from parallel.groups import AXES

    for rank, found in enumerate(pool.run(topology.world_size, sums, topology)):
        for name, axes in AXES.items():
            (mine,) = [ranks for ranks in topology.groups(axes) if rank in ranks]
            assert found[name] == (sum(10**peer for peer in mine), mine.index(rank), len(mine)), name
        (stages,) = [ranks for ranks in topology.groups("pp") if rank in ranks]
        assert found["stage"] == topology.coordinates(rank)["pp"]
        assert found["embd"] == ([stages[0], stages[-1]] if topology.pp > 1 else None)
