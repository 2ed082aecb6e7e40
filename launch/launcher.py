"""From a request to a command: one process started plainly, several by torchrun."""

from __future__ import annotations

import sys

from launch.environment import LaunchError, crowding, rank_variables, usable_cores
from launch.request import LaunchRequest, Rendered

# With one rank the store has no peers, so any free port will do: torch takes 0 for that.
ONE_RANK = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def render(request: LaunchRequest) -> Rendered:
    """The command for this machine.

    Raises:
        LaunchError: the request needs several nodes, or more ranks than it allows on one.
    Example:
        >>> from pathlib import Path
        >>> render(LaunchRequest(Path("run"), ("python", "rank.py"), world_size=1)).argv
        ('python', 'rank.py')
    """
    if request.nodes != 1:
        raise LaunchError(
            f"cluster.nodes={request.nodes}, but isotrain train starts the ranks of one machine",
            "cluster.nodes=1, or start every node by hand: torchrun --nnodes ... -m orchestrator train KEY=VALUE ...",
        )
    if not 1 <= request.world_size <= request.ranks_per_node:
        raise LaunchError(
            f"the plan needs {request.world_size} ranks, but cluster.gpus_per_node={request.ranks_per_node}",
            f"cluster.gpus_per_node={request.world_size}",
        )
    variables = rank_variables(request.world_size, usable_cores()) | dict(request.environment)
    warning = crowding(request.world_size, usable_cores()) if request.device == "cpu" else ""
    if request.world_size == 1:
        return Rendered(request.program, tuple((variables | ONE_RANK).items()), warning)
    # --standalone: a free port that the agent itself holds, so that two runs on one machine never clash.
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    counts = ("--nproc-per-node", str(request.world_size), "--max-restarts", "0")
    return Rendered((*torchrun, *counts, "--no-python", *request.program), tuple(variables.items()), warning)
