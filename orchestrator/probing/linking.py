"""All-reduces over the ranks of a few nodes, each in processes that can be ended when it hangs."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from orchestrator.probing.report import Link

SIZE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
FEWEST, MOST, LONG_ENOUGH_S = 3, 100, 1.0  # all-reduces, and how long they may take together
LAST_WORDS = 0.8  # of the patience: what torch waits for, so that it can say what failed before it is ended


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet: the first node's address and the port of its store."""

    host: str
    port: int


@dataclass(frozen=True)
class Group:
    """Nodes that reduce together, each with so many ranks. ``name``: of this group alone, in the store."""

    name: str
    nodes: tuple[str, ...]
    ranks_per_node: int
    device: str
    patience_s: float


@dataclass(frozen=True)
class Member:
    """One rank of a group."""

    meeting: Meeting
    group: Group
    rank: int
    local_rank: int


def pairs(nodes: Sequence[str], most_rounds: int) -> list[list[tuple[str, str]]]:
    """Rounds in which every node meets another partner (one sits out where their number is odd).

    A node that is slow with all of its partners is to blame, its partners are not: they have others.

    Example:
        >>> pairs(["a", "b", "c", "d"], 2)
        [[('a', 'd'), ('b', 'c')], [('a', 'c'), ('d', 'b')]]
        >>> pairs(["a", "b", "c"], 3)
        [[('b', 'c')], [('a', 'c')], [('a', 'b')]]
    """
    circle: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    rounds = []
    for _ in range(min(most_rounds, len(circle) - 1)):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(one, other) for one, other in facing if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def measure(meeting: Meeting, group: Group, node: str) -> Link:
    """This node's part of a group's all-reduce: its ranks are started, waited for, and ended in any case."""
    peers = tuple(one for one in group.nodes if one != node)
    context: Any = multiprocessing.get_context("spawn" if group.device == "cuda" else "forkserver")
    if group.device == "cpu":
        context.set_forkserver_preload(["torch.distributed"])
    first = group.nodes.index(node) * group.ranks_per_node
    members = [Member(meeting, group, first + local, local) for local in range(group.ranks_per_node)]
    children, ends = [], []
    for member in members:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_reduce, args=(member, theirs), daemon=True)
        child.start()
        theirs.close()
        children.append(child)
        ends.append(ours)
    try:
        return _heard(ends, peers, time.monotonic() + group.patience_s)
    finally:
        for child in children:
            child.kill()


def _heard(ends: Sequence[Connection], peers: tuple[str, ...], deadline: float) -> Link:
    """What the ranks say: the slowest counts, and the first error."""
    rates = []
    for end in ends:
        try:
            if not end.poll(max(0.0, deadline - time.monotonic())):
                return Link(peers, error="no end of the all-reduce: a rank hangs")
            rate, error = end.recv()
        except EOFError:
            return Link(peers, error="a rank of the all-reduce has died")
        if error:
            return Link(peers, error=error)
        rates.append(rate)
    return Link(peers, min(rates))


def _reduce(member: Member, to: Connection) -> None:
    try:
        to.send((_rate(member), ""))
    except Exception as error:  # noqa: BLE001  what it is goes into the report; nobody waits for this process
        lines = str(error).strip().splitlines()
        to.send((0.0, (lines[0] if lines else type(error).__name__)[:200]))


def _rate(member: Member) -> float:
    """Bytes/s over the slowest hop of a ring, of the best of some all-reduces: noise only makes them slower."""
    import torch
    import torch.distributed as dist

    from parallel.device import backend

    group, meeting = member.group, member.meeting
    world = len(group.nodes) * group.ranks_per_node
    timeout = timedelta(seconds=LAST_WORDS * group.patience_s)
    store = dist.PrefixStore(group.name, dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout))
    if group.device == "cuda":
        torch.cuda.set_device(member.local_rank)
    dist.init_process_group(
        backend(group.device), store=store, rank=member.rank, world_size=world, timeout=timeout
    )  # never closed: this process is about to end, and its peers may be gone
    data = torch.zeros(SIZE_BYTES[group.device] // 4, device=group.device)

    def slowest(seconds: list[float]) -> list[float]:
        """Of each all-reduce what the rank that took longest needed: the same on all of them."""
        taken = torch.tensor(seconds, device=group.device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return [float(one) for one in taken]

    def reduced() -> float:
        start = time.perf_counter()
        dist.all_reduce(data)
        float(data[0])  # on a GPU: until it is done
        return time.perf_counter() - start

    reduced()  # opens connections
    (first,) = slowest([reduced()])
    repeats = max(FEWEST, min(MOST, int(LONG_ENOUGH_S / first)))
    best = min(slowest([reduced() for _ in range(repeats)]))
    return 2 * (world - 1) / world * data.numel() * 4 / best
