"""Slurm's nodes, and what of them a job has, in the words of ``scontrol``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launch.slurm.allocation import Allocation
from launch.slurm.commands import ask_again, fields_of

AWAY = frozenset({"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "FUTURE", "UNKNOWN"})


@dataclass(frozen=True)
class Node:
    """``kind``: Slurm's name of its GPUs, empty where it has none or gives none. ``memory_mib``: all of it."""

    name: str
    cores: int
    memory_mib: int
    gpus: int = 0
    kind: str = ""
    partitions: tuple[str, ...] = ()
    is_up: bool = True


def seen_nodes(node_list: str = "") -> list[Node]:
    """The nodes of a list such as ``node[1-3]``; all that there are, where it is empty.

    Raises:
        SlurmError: Slurm does not answer, or knows no such node.
    """
    shown = ask_again(["scontrol", "--oneliner", "show", "node", *([node_list] if node_list else [])])
    return [read_node(line) for line in shown.splitlines() if line.startswith("NodeName=")]


def read_node(line: str) -> Node:
    """A line of ``scontrol --oneliner show node``.

    Example:
        >>> read_node("NodeName=n1 CPUTot=64 Gres=gpu:h100:8(S:0-1) RealMemory=515000 State=IDLE+DRAIN Partitions=a,b")
        Node(name='n1', cores=64, memory_mib=515000, gpus=8, kind='h100', partitions=('a', 'b'), is_up=False)
    """
    fields = fields_of(line)
    count, kind = gpus_of(fields.get("Gres", ""))
    states = {re.sub("[^A-Z]", "", word) for word in fields.get("State", "").split("+")}
    return Node(
        name=fields["NodeName"],
        cores=int(fields.get("CPUTot", "1")),
        memory_mib=int(fields.get("RealMemory", "0")),
        gpus=count,
        kind=kind,
        partitions=tuple(fields.get("Partitions", "").split(",")),
        is_up=not states & AWAY,
    )


def gpus_of(gres: str) -> tuple[int, str]:
    """GPUs of a node in Slurm's words: how many there are of the kind that it has most of, and which (may be empty).

    Example:
        >>> gpus_of("gpu:h100:8(S:0-1),nvme:2"), gpus_of("gpu:4"), gpus_of("(null)"), gpus_of("gpu:t4:1,gpu:a10:3")
        ((8, 'h100'), (4, ''), (0, ''), (3, 'a10'))
    """
    found = [re.sub(r"\(.*?\)", "", part).split(":") for part in re.split(r",(?![^(]*\))", gres)]
    counts = [(int(words[-1]), ":".join(words[1:-1])) for words in found if words[0] == "gpu" and words[-1].isdigit()]
    return max(counts, default=(0, ""), key=lambda one: one[0])


@dataclass(frozen=True)
class Share:
    """What a job has of each of its nodes; 0 and empty where Slurm does not say. ``kind``: of its GPUs."""

    gpus: int = 0
    kind: str = ""
    memory_mib: int = 0


def job_share(allocation: Allocation) -> Share:
    """What a job has of its nodes: by its variables, which not every command of Slurm's sets, else by ``scontrol``.

    Raises:
        SlurmError: Slurm does not answer.
    """
    fields = fields_of(ask_again(["scontrol", "--oneliner", "show", "job", allocation.job_id]).partition("\n")[0])
    asked = fields.get("TresPerNode", "").replace("gres/", "").replace("gres:", "")
    count, kind = gpus_of(asked.replace("gpu=", "gpu:"))
    given = dict(part.split("=") for part in fields.get("AllocTRES", fields.get("TRES", "")).split(",") if "=" in part)
    kinds = [name.partition(":")[2] for name in given if name.startswith("gres/gpu:")]
    return Share(
        gpus=allocation.gpus_per_node or count or int(given.get("gres/gpu", "0")) // allocation.nodes,
        kind=kind or "".join(kinds[:1]),
        memory_mib=allocation.memory_mib or int(mebibytes(given.get("mem", "0M")) / allocation.nodes),
    )


def mebibytes(size: str) -> float:
    """A size in Slurm's words.

    Example:
        >>> mebibytes("250G"), mebibytes("4000M"), mebibytes("1.50T")
        (256000.0, 4000.0, 1572864.0)
    """
    return float(size[:-1]) * 1024.0 ** ("KMGT".index(size[-1]) - 1)
