"""Stage promises: every layer once, in order, no empty stage, the least largest load, a layout that megatron takes."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.stages import StageError, is_even, megatron_layout, split_layers, stage_layers

pipelines = st.tuples(st.integers(1, 12), st.sampled_from([None, 1, 2, 3])).flatmap(
    lambda sizes: st.tuples(
        st.integers(sizes[0] * (sizes[1] or 1), 100),
        st.just(sizes[0]),
        st.just(sizes[1]),
        st.sampled_from([0.0, 0.2, 1.0]),
        st.sampled_from([0.0, 0.7, 2.5, 8.0, 200.0]),
    )
)


@given(pipelines)
@settings(max_examples=100)
def test_every_layer_once_in_order_and_no_empty_chunk(sizes: tuple[int, int, int | None, float, float]) -> None:
    layers, pp, vpp, embedding, head = sizes
    stages = split_layers(layers, pp, vpp, embedding, head)
    assert [layer for chunk in stages for layer in chunk] == list(range(layers))
    assert len(stages) == pp * (vpp or 1) and all(stages)
    assert is_even(stages) == (len({len(chunk) for chunk in stages}) == 1)
    if layers % len(stages) == 0:
        assert is_even(stages), "megatron-core splits evenly where it can"


@given(st.integers(2, 9), st.integers(2, 4), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.0, 0.7, 2.5, 9.0]))
@settings(max_examples=80)
def test_an_uneven_split_has_the_least_possible_largest_load(
    layers: int, pp: int, embedding: float, head: float
) -> None:
    if layers < pp or layers % pp == 0:
        return

    def largest_load(counts: list[int]) -> float:
        loads = [float(count) for count in counts]
        loads[0] += embedding
        loads[-1] += head
        return max(loads)

    every_split = [
        [stop - start for start, stop in zip((0, *cuts), (*cuts, layers), strict=True)]
        for cuts in combinations(range(1, layers), pp - 1)
    ]
    ours = [len(chunk) for chunk in split_layers(layers, pp, None, embedding, head)]
    assert largest_load(ours) == pytest.approx(min(map(largest_load, every_split)))


@given(pipelines)
@settings(max_examples=50)
def test_stages_own_their_virtual_chunks(sizes: tuple[int, int, int | None, float, float]) -> None:
    layers, pp, vpp, embedding, head = sizes
    stages = split_layers(layers, pp, vpp, embedding, head)
    owned = [stage_layers(stages, pp, stage) for stage in range(pp)]
    assert sorted(layer for layers_of_stage in owned for layer in layers_of_stage) == list(range(layers))


@pytest.mark.parametrize(("layers", "pp", "vpp"), [(30, 1, None), (30, 2, None), (30, 4, None), (31, 3, 2), (7, 2, 3)])
def test_megatron_core_reads_the_layout_as_the_same_split(layers: int, pp: int, vpp: int | None) -> None:
    module = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    stages = split_layers(layers, pp, vpp, head_cost=8)
    layout = module.PipelineParallelLayerLayout(megatron_layout(stages), pp)
    layout.validate_layer_layout(layers, None)
    for chunk, indices in enumerate(stages):
        place = {"vp_stage": chunk // pp, "pp_rank": chunk % pp}
        start = sum(len(before) for before in stages[:chunk])
        assert layout.layout[place["pp_rank"]][place["vp_stage"]].count(module.LayerType.decoder) == len(indices)
        assert indices[0] == start


def test_the_head_takes_layers_from_the_last_stage() -> None:
    counts = [len(chunk) for chunk in split_layers(30, 4, head_cost=8)]
    assert counts == [9, 9, 10, 2]


def test_fewer_layers_than_chunks_are_refused_with_numbers() -> None:
    with pytest.raises(StageError, match=r"model has 3 layers, too few for topology.pp=4 = 4 chunks") as caught:
        split_layers(3, pp=4)
    assert caught.value.hint == "topology.pp=3 topology.vpp=null"
    with pytest.raises(StageError, match=r"topology.pp=2 x topology.vpp=2 = 4 chunks"):
        split_layers(3, pp=2, vpp=2)
