"""Cut on one topology, stored, cut out on another: the identity, for all that is fused, padded, replicated or flat."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.load import CheckpointReader
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import SavePolicy, save
from orchestrator.checkpoint.verify import verify
from parallel import names
from parallel.shards import Box, Piece, Shard, flat_boxes
from parallel.specs import ModelSpec
from parallel.stages import split_layers, stage_layers
from tests.parallel.test_names import MOE, SPEC


@dataclass(frozen=True)
class Cut:
    """A topology as far as tensors see it; ``flat``: moments lie in flat ranges over dp (distributed optimizer)."""

    pp: int
    vpp: int | None
    tp: int
    etp: int
    ep: int
    dp: int
    flat: bool


PIPELINES = {
    layers: [(pp, vpp) for pp in range(1, layers + 1) for vpp in (None, 2) if pp * (vpp or 1) <= layers]
    for layers in range(1, 5)
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelSpec, Cut, Cut]:
    sizes = st.sampled_from([1, 2, 3])
    moe = draw(st.booleans())
    spec = replace(
        MOE if moe else SPEC,
        heads=6 * draw(st.integers(1, 2)),
        kv_heads=6,
        head_dim=draw(st.integers(1, 3)),
        ffn=6 * draw(st.integers(1, 2)),
        expert_ffn=6 if moe else None,
        experts=6 if moe else 0,
        hidden=draw(st.integers(1, 5)),
        vocab=draw(st.integers(1, 20)),
        layers=draw(st.integers(1, 4)),
    )
    one, two = (
        Cut(*draw(st.sampled_from(PIPELINES[spec.layers])), *(draw(sizes) for _ in range(4)), draw(st.booleans()))
        for _ in range(2)
    )
    return spec, one, two


def logical(name: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Every element says which tensor and place it is."""
    count = Box.whole(shape).elements
    start = sum(map(ord, f"{name}{kind}")) % 997
    return (torch.arange(count, dtype=torch.float32) + 10_000 * start).reshape(shape)


def local_tensors(spec: ModelSpec, cut: Cut) -> Iterator[list[Piece]]:
    """The pieces of every local tensor of every rank (of dp: one)."""
    stages = split_layers(spec.layers, cut.pp, cut.vpp, head_cost=1.0)
    for rank in range(cut.tp):
        yield [names.vocab_piece(names.EMBEDDING, spec, cut.tp, rank)]
    for layer in itertools.chain.from_iterable(stage_layers(stages, cut.pp, stage) for stage in range(cut.pp)):
        yield from layer_tensors(spec, cut, layer)


def layer_tensors(spec: ModelSpec, cut: Cut, layer: int) -> Iterator[list[Piece]]:
    for rank in range(cut.tp):
        for linear in names.linears(spec, layer):
            if not linear.expert:
                yield list(names.weight_pieces(linear, spec, layer, cut.tp, rank))
    for ep_rank in range(cut.ep if spec.experts else 0):
        for rank in range(cut.etp):
            for linear in names.linears(spec, layer, cut.ep, ep_rank):
                if linear.expert:
                    yield list(names.weight_pieces(linear, spec, layer, cut.etp, rank))


def named_layers(spec: ModelSpec) -> set[str]:
    one = Cut(1, None, 1, 1, 1, 1, False)
    return {
        piece.name for layer in range(spec.layers) for pieces in layer_tensors(spec, one, layer) for piece in pieces
    }


def filled(pieces: list[Piece], kind: str) -> torch.Tensor:
    """The local tensor; what is in no piece (padding) is nan."""
    size = [max(p.local.offset[axis] + p.local.size[axis] for p in pieces) for axis in range(len(pieces[0].shape))]
    local = torch.full(size, float("nan"))
    for piece in pieces:
        local[piece.local.slices] = logical(piece.name, kind, piece.shape)[piece.box.slices]
    return local


def shards(spec: ModelSpec, cut: Cut) -> Iterator[Shard]:
    """What all ranks hold: weights by pieces, a moment whole or in flat ranges of the local tensor."""
    for pieces in local_tensors(spec, cut):
        for kind in ("weight", "exp_avg"):
            local = filled(pieces, kind)
            parts = cut.dp if cut.flat and kind != "weight" else 1
            edges = [local.numel() * part // parts for part in range(parts + 1)]
            for start, stop in itertools.pairwise(edges):
                for box, _ in flat_boxes(tuple(local.shape), start, stop):
                    for piece in pieces:
                        common = box.intersect(piece.local)
                        if common is not None:
                            by = tuple(a - b for a, b in zip(piece.box.offset, piece.local.offset, strict=True))
                            yield Shard(piece.name, kind, piece.shape, common.shift(by), local[common.slices])


@given(cases())
@settings(max_examples=25)
def test_cut_stored_and_cut_elsewhere_is_the_identity(case: tuple[ModelSpec, Cut, Cut]) -> None:
    spec, before, after = case
    with tempfile.TemporaryDirectory() as place:
        folder = save(Path(place), 1, shards(spec, before), Contents("model", {}), policy=SavePolicy(file_bytes=4000))
        assert verify(folder).good
        reader = CheckpointReader(folder)
        for shard in shards(spec, after):
            there = reader.read(shard.name, shard.kind, shard.box)
            assert torch.equal(there, shard.data), (shard.name, shard.kind, shard.box)
        assert {name for name in reader.names() if ".layers." in name} == named_layers(spec)
        for name in reader.names():
            whole = reader.read(name, "weight", Box.whole(reader.shape(name)))
            assert torch.equal(whole, logical(name, "weight", reader.shape(name)))
