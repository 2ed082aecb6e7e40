"""Shard promises: boxes behave as sets of elements, and flat ranges become boxes that read in order."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.shards import Box, Piece, flat_boxes

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@st.composite
def boxes(draw: st.DrawFn, rank: int = 2) -> Box:
    offset = tuple(draw(st.integers(0, 5)) for _ in range(rank))
    return Box(offset, tuple(draw(st.integers(1, 5)) for _ in range(rank)))


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(piece.start, piece.stop) for piece in box.slices)))


def flat_indices(shape: tuple[int, ...], box: Box) -> list[int]:
    """Flat positions of a box's elements, in the row-major order of the box's own data."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    spans = product(*(range(piece.start, piece.stop) for piece in box.slices))
    return [sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in spans]


@given(ranges())
@settings(max_examples=150)
def test_flat_boxes_read_in_order_are_the_range(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    read: list[int] = []
    for box, at in flat_boxes(shape, start, stop):
        assert at == len(read), "every box says where its data begin"
        read += flat_indices(shape, box)
    assert read == list(range(start, stop))


@given(ranges())
@settings(max_examples=100)
def test_flat_boxes_are_few_and_inside(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    found = [box for box, _ in flat_boxes(shape, start, stop)]
    assert len(found) <= 2 * len(shape) - 1
    whole = Box.whole(shape)
    assert all(whole.intersect(box) == box for box in found)
    assert sum(box.elements for box in found) == stop - start


@given(shapes)
def test_the_whole_range_is_one_box(shape: tuple[int, ...]) -> None:
    assert list(flat_boxes(shape, 0, math.prod(shape))) == [(Box.whole(shape), 0)]


@given(boxes(), boxes())
def test_an_intersection_is_the_common_elements(one: Box, other: Box) -> None:
    common = one.intersect(other)
    assert (elements(common) if common else set()) == elements(one) & elements(other)
    assert common == other.intersect(one)


@given(boxes(), boxes(), boxes())
def test_intersections_associate_and_absorb(one: Box, two: Box, three: Box) -> None:
    def meet(left: Box | None, right: Box | None) -> Box | None:
        return left.intersect(right) if left and right else None

    assert meet(meet(one, two), three) == meet(one, meet(two, three))
    assert one.intersect(one) == one
    common = one.intersect(two)
    assert meet(common, one) == common


@given(boxes(), boxes(), st.tuples(st.integers(-3, 3), st.integers(-3, 3)))
def test_shifting_commutes_with_intersecting_and_comes_back(one: Box, two: Box, by: tuple[int, int]) -> None:
    common = one.intersect(two)
    assert one.shift(by).intersect(two.shift(by)) == (common.shift(by) if common else None)
    assert one.shift(by).shift((-by[0], -by[1])) == one
    assert one.shift(by).elements == one.elements == len(elements(one))


@given(shapes)
def test_the_whole_box_holds_every_element(shape: tuple[int, ...]) -> None:
    assert Box.whole(shape).elements == math.prod(shape)
    assert flat_indices(shape, Box.whole(shape)) == list(range(math.prod(shape)))


def test_a_scalar_is_one_element() -> None:
    assert Box.whole(()).elements == 1
    assert Box((), ()).intersect(Box((), ())) == Box((), ())


def test_boxes_of_tensors_of_different_rank_do_not_mix() -> None:
    with pytest.raises(ValueError, match="zip"):
        Box((0,), (1,)).intersect(Box((0, 0), (1, 1)))


def test_a_piece_is_a_value() -> None:
    piece = Piece("w", (4, 2), Box((2, 0), (2, 2)), Box((0, 0), (2, 2)))
    assert piece == Piece("w", (4, 2), Box((2, 0), (2, 2)), Box((0, 0), (2, 2)))
    assert len({piece, piece}) == 1
