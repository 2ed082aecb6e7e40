"""The cells of a certificate: every tuner on every topology up to a number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from parallel.capabilities import BUILT
from parallel.topology import Topology, TopologyError


@dataclass(frozen=True)
class Layout:
    """A column: ``name`` as the grid shows it, and the overrides that ask for it."""

    name: str
    words: tuple[str, ...]
    ranks: int


BATCH = 12  # rows per step: dp may be 1, 2, 3, 4, 6, 12
REFERENCE = Layout("one", (), 1)


def layouts(ranks: int, moe: bool) -> list[Layout]:
    """Every topology of 2 to ``ranks`` processes, and its variants; what a model forbids is found by planning.

    Variants: sequence parallelism with tp, virtual chunks with pp, all-to-all attention with cp, the distributed
    optimizer with dp or cp, full recompute on two processes; all of these at once where two axes meet.

    Example:
        >>> [layout.name for layout in layouts(2, moe=False) if "dp2" in layout.name]
        ['dp2', 'dp2+distributed', 'dp2+recompute']
    """
    return [layout for topology in _topologies(ranks, moe) for layout in _variants(topology, moe)]


def micro_sequences(dp: int, pp: int) -> int:
    """Rows of a micro-batch: as many as leave two micro-batches or more, a multiple of the stages where that can be.

    Example:
        >>> [micro_sequences(dp, pp) for dp, pp in ((1, 1), (2, 1), (4, 1), (1, 3), (1, 4), (2, 2), (2, 4))]
        [6, 3, 1, 4, 3, 3, 1]
    """
    rows = BATCH // dp
    fitting = (count for count in range(2, rows + 1) if rows % count == 0 and count % pp == 0)
    return rows // next(fitting, rows)


def _topologies(ranks: int, moe: bool) -> Iterator[Topology]:
    """By number of processes, then by name."""
    axes = [axis for axis in ("tp", "pp", "dp", "cp") if axis in BUILT.axes]
    experts = [axis for axis in ("ep", "etp") if axis in BUILT.axes and moe]
    sizes = range(1, ranks + 1)
    found = []
    for dense in product(sizes, repeat=len(axes)):
        for expert in product(sizes, repeat=len(experts)):
            asked = dict(zip([*axes, *experts], [*dense, *expert], strict=True))
            try:
                topology = Topology(**asked)
            except TopologyError:
                continue
            if 1 < topology.world_size <= ranks:
                found.append(topology)
    return iter(sorted(found, key=lambda topology: (topology.world_size, -topology.tp, -topology.pp, -topology.dp)))


def _variants(topology: Topology, moe: bool) -> Iterator[Layout]:
    sizes = {axis: getattr(topology, axis) for axis in ("tp", "pp", "dp", "cp", "ep", "etp")}
    name = "·".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
    words = tuple(f"topology.{axis}={size}" for axis, size in sizes.items())
    words += (f"batch.micro_sequences={micro_sequences(topology.dp, topology.pp)}",)
    must_sp = moe and topology.tp > 1
    plain = f"topology.sp={str(must_sp).lower()}"
    variants: list[tuple[str, Sequence[str]]] = [] if must_sp else [("", [plain])]
    if topology.tp > 1:
        variants.append(("+sp", ["topology.sp=true"]))
    if topology.pp > 1:
        variants.append(("+vpp2", ["topology.vpp=2", plain]))
    if topology.cp > 1:
        variants.append(("+ulysses", ["topology.cp_comm=ulysses", plain]))
    if topology.dp * topology.cp > 1:
        variants.append(("+distributed", ["optimizer.distributed=true", plain]))
    if sum(size > 1 for size in sizes.values()) == 1 and topology.world_size == 2:
        variants.append(("+recompute", ["memory.recompute=full", plain]))
    if sum(size > 1 for size in (topology.tp, topology.pp, topology.dp, topology.cp)) > 1:
        switches = [*(["topology.sp=true"] if topology.tp > 1 else [plain]), "memory.recompute=full"]
        switches += ["topology.vpp=2"] * (topology.pp > 1)
        switches += ["optimizer.distributed=true"] * (topology.dp * topology.cp > 1)
        variants.append(("+all", switches))
    for suffix, more in variants:
        yield Layout(name + suffix, (*words, *more), topology.world_size)
