"""Topology promises: a rank grid that is megatron-core's own, groups that partition the world, errors with hints."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.topology import DENSE_AXES, EXPERT_AXES, Topology, TopologyError

MOST_RANKS = 4096
DENSE_SETS = ["-".join(axes) for n in (1, 2, 3, 4) for axes in combinations(DENSE_AXES, n)]
EXPERT_SETS = ["-".join(axes) for n in (1, 2, 3, 4) for axes in combinations(EXPERT_AXES, n)]


def random_topology(draw: random.Random, most_ranks: int = MOST_RANKS) -> Topology:
    """Any grid of at most 4096 ranks; odd sizes too."""
    sizes: dict[str, int] = {}
    room = most_ranks
    for axis in draw.sample(["pp", "dp", "cp", "tp"], 4):
        sizes[axis] = draw.randint(1, max(1, min(room, draw.choice([1, 3, 8, 64]))))
        room //= sizes[axis]
    stage = sizes["dp"] * sizes["cp"] * sizes["tp"]
    experts = draw.choice([size for size in range(1, stage + 1) if stage % size == 0])
    etp = draw.choice([size for size in range(1, experts + 1) if experts % size == 0])
    return Topology(**sizes, ep=experts // etp, etp=etp)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    return random_topology(random.Random(draw(st.integers(0, 2**32))))


def test_groups_and_coordinates_are_those_of_megatron_core() -> None:
    """Against the two generators that initialize_model_parallel makes, on 220 random topologies."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    order = "tp-cp-ep-dp-pp"
    draw = random.Random(20240607)
    seen = {Topology(pp=2, dp=2, cp=2, tp=2, ep=4, etp=2), Topology(dp=MOST_RANKS)}
    while len(seen) < 220:
        seen.add(random_topology(draw, MOST_RANKS if len(seen) < 40 else 200))  # theirs is slow on large worlds
    for topology in sorted(seen, key=str):
        sizes = {"pp": topology.pp, "order": order}
        dense = parallel_state.RankGenerator(tp=topology.tp, ep=1, dp=topology.dp, cp=topology.cp, **sizes)
        expert = parallel_state.RankGenerator(tp=topology.etp, ep=topology.ep, dp=topology.edp, cp=1, **sizes)
        megatron_name = {"etp": "tp", "edp": "dp", "ep": "ep", "pp": "pp"}
        every = range(topology.world_size)
        places = [topology.coordinates(rank) for rank in every]
        few = 15 if topology.world_size <= 256 else 3
        for axes in draw.sample(DENSE_SETS, few):
            assert topology.groups(axes) == [tuple(ranks) for ranks in dense.get_ranks(axes)], (topology, axes)
        for axes in draw.sample(EXPERT_SETS, few):
            token = "-".join(megatron_name[axis] for axis in axes.split("-"))
            assert topology.groups(axes) == [tuple(ranks) for ranks in expert.get_ranks(token)], (topology, axes)
        for axis, generator, token in [
            *((axis, dense, axis) for axis in DENSE_AXES),
            *((axis, expert, megatron_name[axis]) for axis in EXPERT_AXES),
        ]:
            for ranks in generator.get_ranks(token):
                assert [places[rank][axis] for rank in ranks] == list(range(len(ranks))), (topology, axis)


@given(topologies(), st.sampled_from(DENSE_SETS + EXPERT_SETS))
@settings(max_examples=60)
def test_groups_partition_the_world(topology: Topology, axes: str) -> None:
    groups = topology.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    assert all(len(group) == topology.size(axes) and list(group) == sorted(group) for group in groups)
    assert groups == topology.groups("-".join(reversed(axes.split("-")))), "the order of names must not matter"


@given(topologies(), st.integers(0, 2**32), st.sampled_from(DENSE_SETS + EXPERT_SETS))
@settings(max_examples=100)
def test_coordinates_round_trip_and_find_the_group(topology: Topology, seed: int, axes: str) -> None:
    rank = seed % topology.world_size
    here = topology.coordinates(rank)
    assert topology.rank(**{axis: here[axis] for axis in DENSE_AXES}) == rank
    assert topology.rank(**{axis: here[axis] for axis in EXPERT_AXES}) == rank
    assert [topology.group(axes, rank)] == [group for group in topology.groups(axes) if rank in group]


@given(topologies())
@settings(max_examples=60)
def test_both_grids_fill_a_stage(topology: Topology) -> None:
    assert topology.stage_ranks * topology.pp == topology.world_size
    assert topology.edp * topology.ep * topology.etp == topology.stage_ranks
    assert math.prod(topology.size(axis) for axis in DENSE_AXES) == topology.world_size


def test_missing_coordinates_are_zero() -> None:
    assert Topology(pp=2, dp=2).rank() == 0
    assert Topology(pp=2, dp=2).rank(pp=1) == 2


@pytest.mark.parametrize("size", [0, -1, True, 2.0, None])
def test_a_size_that_is_no_positive_whole_number_is_refused(size: object) -> None:
    with pytest.raises(TopologyError, match=r"topology.tp=.* is no positive whole number") as caught:
        Topology(tp=size)  # type: ignore[arg-type]
    assert caught.value.hint == "topology.tp=1"


def test_experts_that_do_not_fill_a_stage_are_refused_with_numbers() -> None:
    with pytest.raises(TopologyError) as caught:
        Topology(pp=2, dp=3, tp=2, ep=4)
    assert str(caught.value) == (
        "topology.ep=4 x topology.etp=1 = 4 does not divide the 6 ranks of a pipeline stage (dp=3 cp=1 tp=2)"
    )
    assert caught.value.hint == "topology.ep=2 topology.etp=1"
    Topology(pp=2, dp=3, tp=2, ep=2, etp=1)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("xp", "unknown axis 'xp' in 'xp'"),
        ("", "unknown axis ''"),
        ("tp-tp", "axes 'tp-tp' name an axis twice"),
        ("tp-ep", "axes 'tp-ep' are of two grids"),
    ],
)
def test_names_that_are_no_set_of_axes_are_refused(axes: str, message: str) -> None:
    for ask in (Topology(dp=2).groups, Topology(dp=2).size, lambda names: Topology(dp=2).group(names, 0)):
        with pytest.raises(TopologyError, match=message):
            ask(axes)


def test_ranks_and_coordinates_outside_the_world_are_refused() -> None:
    with pytest.raises(TopologyError, match=r"rank 4 is not in 0..3 \(pp=2 dp=2 cp=1 tp=1\)"):
        Topology(pp=2, dp=2).coordinates(4)
    with pytest.raises(TopologyError, match=r"rank -1 is not in 0..3"):
        Topology(pp=2, dp=2).group("dp", -1)
    with pytest.raises(TopologyError, match=r"dp=2 is not in 0..1 \(pp=2 dp=2 cp=1 tp=1\)"):
        Topology(pp=2, dp=2).rank(dp=2)
    with pytest.raises(TopologyError, match="are of two grids"):
        Topology(pp=2, dp=2).rank(dp=1, ep=0)
