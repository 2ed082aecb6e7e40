"""Nearest: the smallest change of a topology that cannot run which makes one that does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from orchestrator.config.job import TopologyConfig
from orchestrator.planning.candidates import Question
from orchestrator.planning.search import Judge


def nearest_legal(question: Question) -> str:
    """The smallest change of what the user fixed that makes a plan, as text to type; empty when there is none.

    Fewest keys first, then the smallest ratios, then dp before pp before tp.
    """
    asked, judge = question.job.topology, Judge(question)
    best: tuple[tuple[int, float, int], str] | None = None
    for sizes in _all_topologies(question):
        changes = _changes(asked, sizes)
        far = sum(abs(math.log2(new / old)) for _, old, new in changes if isinstance(new, int) and new)
        priority = max((("dp", "pp", "tp").index(key) for key, _, _ in changes if key in ("dp", "pp", "tp")), default=0)
        cost = (len(changes), round(far, 9), priority)
        if changes and (best is None or cost < best[0]) and judge.runs(sizes):
            best = cost, " ".join(f"topology.{key}={_typed(new)}" for key, _, new in changes)
    return best[1] if best else ""


def _changes(asked: TopologyConfig, sizes: TopologyConfig) -> list[tuple[str, Any, Any]]:
    """What the user fixed that is otherwise in ``sizes``: key, asked value, other value."""
    keys = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "sp", "cp_comm")
    every = [(key, getattr(asked, key), getattr(sizes, key)) for key in keys]
    return [(key, old, new) for key, old, new in every if old is not None and old != new]


def _typed(value: int | str | None) -> str:
    """A value as Hydra's override grammar spells it."""
    return "null" if value is None else str(value).lower()


def _all_topologies(question: Question) -> Iterator[TopologyConfig]:
    """Every topology of tp, pp and dp on the cluster; the other axes are as asked or off."""
    asked, ranks, nodes = question.job.topology, question.cluster.ranks, question.cluster.nodes
    sizes = [size for size in range(1, ranks + 1) if nodes == 1 or ranks % size == 0]
    switches = [{getattr(asked, axis) or 1, 1} for axis in ("cp", "ep", "etp")]
    kinds = {asked.cp_comm, "ring" if asked.cp_comm else None}
    settings = product({asked.sp, False if asked.sp else asked.sp}, {asked.vpp, None}, kinds, *switches)
    for sp, vpp, kind, cp, ep, etp in settings:
        base = TopologyConfig(vpp=vpp, cp=cp, ep=ep, etp=etp, sp=sp, cp_comm=kind)
        for tp, pp in product(sizes, sizes):
            room = ranks // (tp * pp * (cp or 1))
            for dp in range(1, room + 1) if nodes == 1 else [room] * min(1, room):
                yield replace(base, tp=tp, pp=pp, dp=dp)
