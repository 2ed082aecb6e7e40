"""The pure half of a save: proofs of coverage, files, blocks and rounds, over random cuts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.coverage import CoverageError, prove
from orchestrator.checkpoint.exchange import Peers, plan_rounds
from orchestrator.checkpoint.layout import LogicalTensor, assign, make_layout, weight_index
from orchestrator.checkpoint.tensor_file import item_bytes
from parallel.shards import Box

Pieces = list[list[tuple[LogicalTensor, Box]]]


def split(draw: st.DrawFn, box: Box, times: int) -> list[Box]:
    """Cut a box into disjoint boxes at random places."""
    boxes = [box]
    for _ in range(times):
        victim = draw(st.integers(0, len(boxes) - 1))
        axes = [axis for axis, count in enumerate(boxes[victim].size) if count > 1]
        if not axes:
            continue
        one = boxes.pop(victim)
        axis = draw(st.sampled_from(axes))
        at = draw(st.integers(1, one.size[axis] - 1))
        for start, count in ((0, at), (at, one.size[axis] - at)):
            offset, size = list(one.offset), list(one.size)
            offset[axis], size[axis] = offset[axis] + start, count
            boxes.append(Box(tuple(offset), tuple(size)))
    return boxes


@st.composite
def cuts(draw: st.DrawFn) -> Pieces:
    """Random tensors, randomly cut and handed out, some boxes to several ranks."""
    ranks = draw(st.integers(1, 5))
    held: Pieces = [[] for _ in range(ranks)]
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
        kind, dtype = draw(st.sampled_from([("weight", "BF16"), ("exp_avg", "F32"), ("weight", "F64")]))
        tensor = LogicalTensor(f"layers.{number}.w", kind, shape, dtype)
        for box in split(draw, Box.whole(shape), draw(st.integers(0, 5))):
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                held[rank].append((tensor, box))
    return held


@settings(max_examples=150)
@given(cuts())
def test_every_true_cut_is_proven(held: Pieces) -> None:
    proven = prove(held)
    for tensor, boxes in proven.items():
        assert sum(item.box.elements for item in boxes) == Box.whole(tensor.shape).elements
        for item in boxes:
            assert item.ranks == tuple(rank for rank, pieces in enumerate(held) if (tensor, item.box) in pieces)


@settings(max_examples=150)
@given(cuts(), st.data())
def test_a_missing_box_is_found(held: Pieces, data: st.DataObject) -> None:
    tensor, lost = data.draw(st.sampled_from([piece for pieces in held for piece in pieces]))
    rest = [[piece for piece in pieces if piece != (tensor, lost)] for pieces in held]
    rest[0].append((tensor, Box(lost.offset, (0,) * len(lost.size)) if lost.size else lost))
    if lost.size:
        with pytest.raises(CoverageError, match=rf"{tensor.name} .* is held by no rank"):
            prove(rest)


@settings(max_examples=150)
@given(cuts(), st.data())
def test_unequal_boxes_that_overlap_are_found(held: Pieces, data: st.DataObject) -> None:
    tensor, one = data.draw(st.sampled_from([piece for pieces in held for piece in pieces]))
    if one == Box.whole(tensor.shape):
        return
    held[-1].append((tensor, Box.whole(tensor.shape)))
    with pytest.raises(CoverageError, match=r"overlap in .* without being equal"):
        prove(held)


@settings(max_examples=150)
@given(cuts(), st.sampled_from([64, 200, 4096]), st.sampled_from([1, 100, 10**6]))
def test_rounds_fill_every_file_once_in_order_within_the_buffer(
    held: Pieces, buffer_bytes: int, file_bytes: int
) -> None:
    holdings, ranks = prove(held), len(held)
    layout = make_layout(holdings, "model", ranks, file_bytes)
    written = {file.path: 0 for file in layout.files}
    for tasks in plan_rounds(layout, holdings, ranks, buffer_bytes):
        assert tasks and len({task.block.owner for task in tasks}) == len(tasks)
        staged = [0] * ranks
        for task in tasks:
            block = task.block
            assert block.start == written[block.file.path] < block.stop
            assert layout.owners[layout.files.index(block.file)] == block.owner
            written[block.file.path] = block.stop
            filled = [0] * (block.stop - block.start)
            for move in task.moves:
                assert (move.name, move.kind) in {(t.name, t.kind) for t, box in held[move.sender] if box == move.held}
                item, strides = item_bytes(move.dtype), [1]
                for count in reversed(move.frame.size[1:]):
                    strides.insert(0, strides[0] * count)
                inside = move.region.shift(tuple(-start for start in move.frame.offset))
                for index in itertools.product(*(range(part.start, part.stop) for part in inside.slices)):
                    place = move.at + item * sum(i * stride for i, stride in zip(index, strides, strict=False))
                    for byte in range(place, place + item):
                        filled[byte] += 1
            assert filled == [1] * len(filled)
            assert block.stop - block.start <= buffer_bytes // 4
            for rank, count in task.message_bytes().items():
                staged[rank] += count
        assert max(staged) <= buffer_bytes // 2
    assert written == {file.path: file.data_bytes for file in layout.files}


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_owners_are_balanced_by_bytes(sizes: list[int], ranks: int) -> None:
    load = [0] * ranks
    for size, owner in zip(sizes, assign(sizes, ranks), strict=True):
        load[owner] += size
    assert max(load) <= sum(sizes) / ranks + max(sizes, default=0)


def test_files_are_cut_by_bytes_and_in_the_order_of_layers() -> None:
    tensors = [
        LogicalTensor(f"model.layers.{layer}.w", kind, (10,), "F32")
        for layer in (10, 2, 1)
        for kind in ("weight", "exp_avg")
    ]
    layout = make_layout(tensors, "model", 2, file_bytes=80)
    assert [(file.path, [tensor.key for tensor in file.tensors]) for file in layout.files] == [
        ("model/model-00001-of-00002.safetensors", ["model.layers.1.w", "model.layers.2.w"]),
        ("model/model-00002-of-00002.safetensors", ["model.layers.10.w"]),
        ("optimizer/part-00001-of-00002.safetensors", ["model.layers.1.w.exp_avg", "model.layers.2.w.exp_avg"]),
        ("optimizer/part-00002-of-00002.safetensors", ["model.layers.10.w.exp_avg"]),
    ]
    index = weight_index(layout.files)
    assert index is not None and index["metadata"] == {"total_size": 120}
    assert weight_index(make_layout(tensors, "model", 2).files) is None
    assert make_layout(tensors, "model", 1).files[0].path == "model/model.safetensors"


def test_unknown_rooms_double_tensors_and_wrong_groups_are_our_own_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no room 'attic'"):
        make_layout([], "attic", 1)
    twice = [LogicalTensor("w", "weight", (shape,), "F32") for shape in (1, 2)]
    with pytest.raises(ValueError, match="described twice: w"):
        make_layout(twice, "model", 1)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(ValueError, match="this one carries cuda:nccl"):
        Peers.of()
