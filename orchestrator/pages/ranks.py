"""Where ranks sit: the coordinates of every rank of a few nodes, and which stage every node belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.pages.drawing import boxes, drawing
from orchestrator.pages.markup import Markup, joined, tag
from parallel.topology import Topology

MOST_CARDS = 8
"""Nodes that are shown rank by rank."""
WIDTH, COLUMNS = 1160, 64
AXES = ("pp", "dp", "cp", "tp", "ep", "etp")


@dataclass(frozen=True)
class Node:
    """A node and its ranks; fewer than its places where some stay idle."""

    number: int
    ranks: range


def nodes_of(topology: Topology, nodes: int, places: int) -> list[Node]:
    """Ranks in their order, node by node.

    Example:
        >>> nodes_of(Topology(dp=6), 2, 4)
        [Node(number=0, ranks=range(0, 4)), Node(number=1, ranks=range(4, 6))]
    """
    world = topology.world_size
    return [Node(node, range(min(node * places, world), min((node + 1) * places, world))) for node in range(nodes)]


def alike(topology: Topology, nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes that differ only in which stage and which replica they are, together; the first of each in its order."""
    groups: defaultdict[object, list[Node]] = defaultdict(list)
    for node in nodes:
        places = [topology.coordinates(rank) for rank in node.ranks]
        first = places[0] if places else {}
        moving = ("pp", "dp", "edp")
        key = tuple(
            tuple((axis, at - first[axis] if axis in moving else at) for axis, at in place.items()) for place in places
        )
        groups[key].append(node)
    return list(groups.values())


def rank_grid(topology: Topology, nodes: int, places: int) -> Markup:
    """Every node with its ranks; of many nodes one of each kind, and a map of all."""
    every = nodes_of(topology, nodes, places)
    if nodes <= MOST_CARDS:
        return tag("div", *(_card(topology, node, places, "") for node in every), class_="nodes")
    groups = alike(topology, every)
    cards = [
        _card(topology, group[0], places, f"and {len(group) - 1:,} like it" if len(group) > 1 else "")
        for group in groups[:MOST_CARDS]
    ]
    more = len(groups) - len(cards)
    kinds = f" {more:,} more kinds of nodes are not shown." if more else ""
    like = (
        f"All {nodes:,} nodes. Nodes are alike where they differ only in their stage and in which replicas they are;"
        f" one of each kind is shown above.{kinds} Colours go from stage 0 to stage {topology.pp - 1}."
    )
    return joined([tag("div", *cards, class_="nodes"), tag("p", like, class_="note"), _map(topology, every)])


def stage_colour(stage: int, pp: int) -> str:
    """A colour for a stage, from blue over green to red."""
    hue = 215 - 205 * stage / max(1, pp - 1)
    return f"hsl({hue:.0f} 58% 50%)"


def _card(topology: Topology, node: Node, places: int, like: str) -> Markup:
    said = tag("h3", f"node {node.number} ", tag("small", like))
    cells = [_cell(topology, rank) for rank in node.ranks]
    idle = places - len(node.ranks)
    cells += [tag("div", "idle", class_="rank idle", style="--key:var(--rule)")] * idle
    return tag("div", said, tag("div", *cells, class_="ranks"), class_="node")


def _cell(topology: Topology, rank: int) -> Markup:
    at = topology.coordinates(rank)
    sizes = {axis: getattr(topology, axis) for axis in AXES}
    shown = [f"{axis} {at[axis]}" for axis in AXES if sizes[axis] > 1]
    peers = [f"{axis} group: {_some(topology.group(axis, rank))}" for axis in AXES if sizes[axis] > 1]
    tip = "\n".join([f"rank {rank}: " + ", ".join(f"{axis} {at[axis]} of {sizes[axis]}" for axis in AXES), *peers])
    colour = stage_colour(at["pp"], topology.pp)
    return tag("div", tag("b", str(rank)), *_lines(shown), class_="rank", style=f"--key:{colour}", data_tip=tip)


def _lines(shown: Sequence[str]) -> list[Markup]:
    """Two coordinates a line."""
    pairs = [" ".join(shown[start : start + 2]) for start in range(0, len(shown), 2)]
    return [joined([tag("br"), pair]) for pair in pairs]


def _some(ranks: Sequence[int]) -> str:
    return (
        ", ".join(map(str, ranks))
        if len(ranks) <= 8
        else f"{len(ranks)} ranks, {ranks[0]}, {ranks[1]}, ... {ranks[-1]}"
    )


def _map(topology: Topology, nodes: Sequence[Node]) -> Markup:
    """One square per node, striped where a node holds several stages."""
    cell = WIDTH / COLUMNS
    squares: defaultdict[int, list[tuple[float, float, float, float]]] = defaultdict(list)
    held: defaultdict[int, list[int]] = defaultdict(list)
    for node in nodes:
        stages = sorted({topology.coordinates(rank)["pp"] for rank in node.ranks})
        x, y = node.number % COLUMNS * cell, node.number // COLUMNS * cell
        for stripe, stage in enumerate(stages):
            width = (cell - 2) / len(stages)
            squares[stage].append((x + stripe * width, y, width, cell - 2))
            held[stage].append(node.number)
    parts = [
        tag(
            "path", d=boxes(places), fill=stage_colour(stage, topology.pp), data_tip=_held(topology, stage, held[stage])
        )
        for stage, places in sorted(squares.items())
    ]
    rows = -(-len(nodes) // COLUMNS)
    return tag("div", drawing(WIDTH, rows * cell, "nodes by pipeline stage", *parts), class_="wide")


def _held(topology: Topology, stage: int, nodes: Sequence[int]) -> str:
    first = stage * topology.stage_ranks
    return (
        f"stage {stage}: nodes {nodes[0]:,} to {nodes[-1]:,}\nranks {first:,} to {first + topology.stage_ranks - 1:,}"
    )
