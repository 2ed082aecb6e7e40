"""Cores, memory, ports, and two processes that really meet."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from launch.pool import Pool, RankError
from orchestrator.config.job import ClusterConfig
from orchestrator.doctor.finding import Finding, State

GIB = 2**30
MEETING_S = 120  # two cold processes on a slow disk
WORLD = 2


@dataclass(frozen=True)
class Port:
    """Whether a process can listen at an address of this host and be reached there; ``error``: why not."""

    name: str
    address: str
    error: str = ""


def check_cores(ranks: int, cores: int, device: str) -> Finding:
    """Whether the ranks of this machine have a core each.

    Example:
        >>> check_cores(ranks=4, cores=2, device="cpu").hint
        'cluster.gpus_per_node=2'
    """
    words = f"{cores} for {ranks} rank{'s' if ranks > 1 else ''}"
    if ranks <= cores:
        return Finding("cores", "ok", words)
    hint = f"cluster.gpus_per_node={cores}" if device == "cpu" else "ask for more cores (sbatch --cpus-per-task)"
    return Finding("cores", "warning", f"{words}: they take turns", hint)


def check_memory(needed_gib: float, available_gib: float, is_planned: bool) -> Finding:
    """Whether the ranks of this machine fit into its memory.

    Args:
        needed_gib: of all ranks here: the plan's estimate, or what the cluster says that it has.
        is_planned: which of the two it is.

    Example:
        >>> check_memory(16, 8, is_planned=False).found
        '8.0 GiB available, 16.0 GiB in the cluster'
    """
    words = f"{available_gib:.1f} GiB available, {needed_gib:.1f} GiB {'planned' if is_planned else 'in the cluster'}"
    if needed_gib <= available_gib:
        return Finding("memory", "ok", words)
    hint = "batch.micro_sequences=1   or   memory.recompute=full" if is_planned else "cluster=one"
    return Finding("memory", "warning", words, hint)


def seen_ports() -> list[Port]:
    """The loopback, and the address that this host's name stands for; each tried by listening and connecting."""
    name = socket.gethostname()
    loopback = Port("loopback", "127.0.0.1", _listening_error("127.0.0.1"))
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return [loopback, Port(name, "", f"the name has no address: {error.strerror}")]
    return [loopback, Port(name, address, _listening_error(address))]


def _listening_error(address: str) -> str:
    try:
        with socket.create_server((address, 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def check_ports(ports: list[Port], cluster: ClusterConfig) -> list[Finding]:
    """Whether ranks could meet: on the loopback always, at the host's own address where there are several nodes."""
    findings = []
    for port in ports:
        place = f"{port.name} ({port.address})" if port.address else port.name
        if not port.error:
            findings.append(Finding("ports", "ok", f"a port of {place} can be bound and reached"))
        elif port.name == "loopback":
            words = f"no port of {place} can be bound and reached: {port.error}"
            findings.append(Finding("ports", "fault", words, "ip link set lo up"))
        else:
            state: State = "fault" if cluster.nodes > 1 else "warning"
            words = f"no port of {place} can be bound and reached: {port.error}"
            hint = f'echo "127.0.1.1 {port.name}" | sudo tee -a /etc/hosts'
            findings.append(Finding("ports", state, words, hint))
    return findings


def summed_ranks() -> int:
    """What every rank of a group of two gets: 0 + 1, by an all-reduce."""
    import torch
    import torch.distributed as dist

    value = torch.tensor(dist.get_rank())
    dist.all_reduce(value)
    return int(value)


def met(pool: Pool, timeout_s: float = MEETING_S) -> str:
    """Let two processes that import torch and megatron-core open a gloo group and sum their ranks.

    Returns:
        Empty when both have the sum, else the last line of what went wrong.
    """
    try:
        answers = pool.run(WORLD, summed_ranks, timeout_s=timeout_s)
    except RankError as error:
        return str(error).strip().splitlines()[-1]
    return "" if answers == [1, 1] else f"the sum of ranks is {answers}, not [1, 1]"


def check_group(error: str) -> Finding:
    """The proof: two processes met and agreed.

    Example:
        >>> check_group("").state, check_group("ImportError: no such library").hint
        ('ok', 'make setup')
    """
    if not error:
        return Finding("processes", "ok", "two processes opened a gloo group and summed over it")
    is_set_up = "ImportError" not in error and "ModuleNotFoundError" not in error
    hint = "GLOO_SOCKET_IFNAME=lo isotrain doctor   (if that helps, export it)" if is_set_up else "make setup"
    return Finding("processes", "fault", f"two processes did not meet: {error}", hint)
