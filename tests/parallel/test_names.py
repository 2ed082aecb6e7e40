"""Names: cutting logical tensors over tp and merging them again is the identity, whatever is fused with what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import names
from parallel.families import read_model
from parallel.specs import ModelSpec
from tests.helpers import runs

SPEC = ModelSpec(
    family="qwen2",
    layers=2,
    hidden=12,
    heads=6,
    kv_heads=6,
    head_dim=4,
    ffn=12,
    vocab=10,
    max_positions=32,
    norm_epsilon=1e-5,
    rope_theta=1e4,
    tied_embeddings=False,
    qkv_bias=True,
)
MOE = replace(SPEC, family="qwen3_moe", experts=4, experts_per_token=2, expert_ffn=12)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ModelSpec, int]:
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tp * draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    spec = replace(
        SPEC,
        heads=heads,
        kv_heads=groups,
        head_dim=draw(st.integers(1, 3)),
        ffn=tp * draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 5)),
        vocab=draw(st.integers(1, 20)),
    )
    return spec, tp


def logical(piece_shape: tuple[int, ...], name: str) -> np.ndarray:
    """Every element says which tensor and place it is."""
    offset = sum(map(ord, name)) * 1_000_000
    return np.arange(np.prod(piece_shape)).reshape(piece_shape) + offset


@given(cuts())
@settings(max_examples=150)
def test_cut_and_merge_is_the_identity(case: tuple[ModelSpec, int]) -> None:
    assert_cut_and_merged(*case, layer=0)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_cut_and_merge_is_the_identity_in_layers_of_every_kind(family: str, tp: int) -> None:
    spec = read_model(runs.config(family))
    kinds = names.kinds_of_layers(spec)
    assert kinds == [0, spec.dense_layers]
    for layer in kinds:
        assert_cut_and_merged(spec, tp, layer)


def assert_cut_and_merged(spec: ModelSpec, tp: int, layer: int) -> None:
    for linear in names.linears(spec, layer):
        merged: dict[str, np.ndarray] = {}
        for rank in range(tp):
            for pieces in (names.weight_pieces, names.bias_pieces):
                if pieces is names.bias_pieces and linear.cut != "column":
                    continue
                listed = list(pieces(linear, spec, 0, tp, rank))
                axes = range(len(listed[0].shape))
                size = tuple(max(p.local.offset[d] + p.local.size[d] for p in listed) for d in axes)
                local = np.full(size, -1)
                for piece in listed:
                    assert (local[piece.local.slices] == -1).all(), "pieces overlap in the local tensor"
                    local[piece.local.slices] = logical(piece.shape, piece.name)[piece.box.slices]
                assert (local >= 0).all(), "the local tensor has a hole"
                for piece in listed:
                    whole = merged.setdefault(piece.name, np.full(piece.shape, -1))
                    assert linear.cut == "whole" or (whole[piece.box.slices] == -1).all(), "ranks overlap"
                    whole[piece.box.slices] = local[piece.local.slices]
        for name, whole in merged.items():
            assert (whole == logical(whole.shape, name)).all()


@given(cuts(), st.integers(1, 5))
@settings(max_examples=100)
def test_adapter_halves_cover_their_wholes(case: tuple[ModelSpec, int], r: int) -> None:
    spec, tp = case
    for linear in names.linears(spec, 0):
        for part in linear.parts:
            out, width = names.shape(part[0], spec)
            if (width if linear.cut == "row" else out) % tp:
                continue
            covered_a, covered_b = np.zeros((r, width), int), np.zeros((out, r), int)
            for rank in range(tp):
                piece_a, piece_b = names.adapter_pieces(linear, part, spec, 1, r, tp, rank)
                assert (piece_a.shape, piece_b.shape) == ((r, width), (out, r))
                assert piece_a.local.size == piece_a.box.size
                covered_a[piece_a.box.slices] += 1
                covered_b[piece_b.box.slices] += 1
            replicated = covered_b if linear.cut == "row" else covered_a
            cut = covered_a if linear.cut == "row" else covered_b
            assert (replicated == tp).all()
            assert (cut == 1).all()


@given(cuts())
@settings(max_examples=100)
def test_vocabulary_rows_are_covered_once_and_padding_is_in_no_piece(case: tuple[ModelSpec, int]) -> None:
    spec, tp = case
    covered = np.zeros((spec.vocab, spec.hidden), int)
    for rank in range(tp):
        piece = names.vocab_piece(names.EMBEDDING, spec, tp, rank)
        assert piece.local.offset == (0, 0)
        covered[piece.box.slices] += 1
    assert (covered == 1).all()
    assert names.padded_vocab(spec.vocab, tp) % tp == 0


def test_a_fused_qkv_is_laid_out_group_by_group() -> None:
    """One key/value group of two query heads, by hand: q0 q1 k v."""
    spec = replace(SPEC, heads=4, kv_heads=2, head_dim=1, hidden=1)
    linear = next(names.linears(spec, 0))
    pieces = names.weight_pieces(linear, spec, 0, 2, 1)
    assert {(p.name.split(".")[-2], p.box.offset[0], p.local.offset[0]) for p in pieces} == {
        ("q_proj", 2, 0),
        ("k_proj", 1, 2),
        ("v_proj", 1, 3),
    }


def test_gate_and_up_are_each_cut_not_their_concatenation() -> None:
    """Fault 1 of today's tools: rows of gate|up cut plainly on axis 0 land in the wrong place at another tp."""
    linear = next(linear for linear in names.linears(SPEC, 0) if linear.path == "mlp.linear_fc1")
    pieces = names.weight_pieces(linear, SPEC, 0, 2, 1)
    assert [(p.name.split(".")[-2], p.box.offset[0], p.local.offset[0]) for p in pieces] == [
        ("gate_proj", 6, 0),
        ("up_proj", 6, 6),
    ]


def test_experts_are_numbered_over_expert_parallel_ranks() -> None:
    paths = [linear for linear in names.linears(MOE, 0, ep=2, ep_rank=1) if linear.expert]
    assert [linear.path for linear in paths][:2] == [f"mlp.experts.local_experts.{i}.linear_fc1" for i in (0, 1)]
    assert {path for linear in paths for _, path in linear.parts if path.endswith("down_proj")} == {
        "mlp.experts.2.down_proj",
        "mlp.experts.3.down_proj",
    }


@pytest.mark.parametrize(
    ("targets", "count", "example"),
    [
        ("all-linear", 14, "model.layers.1.mlp.down_proj"),
        (["q_proj"], 2, "model.layers.0.self_attn.q_proj"),
        ("q_proj", 2, "model.layers.1.self_attn.q_proj"),
        (["self_attn.v_proj", "up_proj"], 4, "model.layers.0.mlp.up_proj"),
        (["model.layers.1.mlp.gate_proj"], 1, "model.layers.1.mlp.gate_proj"),
        (r".*layers\.0\..*(q|k)_proj", 2, "model.layers.0.self_attn.k_proj"),
    ],
)
def test_targets_are_found_as_peft_finds_them(targets: str | list[str], count: int, example: str) -> None:
    found = names.resolve_targets(targets, SPEC)
    assert len(found) == count
    assert example in found


@pytest.mark.parametrize(
    ("targets", "count", "example"),
    [
        (["gate"], 2, "model.layers.1.mlp.gate"),
        (["gate_proj", "up_proj"], 16, "model.layers.0.mlp.experts.3.up_proj"),
        ("down_proj", 8, "model.layers.1.mlp.experts.0.down_proj"),
        (r".*layers\.0\.mlp\.experts\..*", 12, "model.layers.0.mlp.experts.1.gate_proj"),
    ],
)
def test_experts_and_router_are_targets(targets: str | list[str], count: int, example: str) -> None:
    found = names.resolve_targets(targets, MOE)
    assert len(found) == count
    assert example in found


@pytest.mark.parametrize(
    ("targets", "spec", "message", "hint"),
    [
        (["q_porj"], SPEC, "'q_porj' matches no linear layer of this qwen2 model", "near names: q_proj"),
        ("layers.0", SPEC, "'layers.0' matches no linear layer (a string must match the whole path", "near names: "),
        ("(", SPEC, "'(' is no regular expression", "tuner.targets=all-linear"),
        ([], SPEC, "tuner.targets is empty", "tuner.targets=all-linear"),
        (
            "all-linear",
            MOE,
            "trains one dense adapter over gate and up",
            "tuner.targets=[q_proj,k_proj,v_proj,o_proj,gate,gate_proj,up_proj,down_proj]",
        ),
        (
            ["gate_proj"],
            MOE,
            "takes 4 of the 8 experts' gate_proj and up_proj in layer 0, first mlp.experts.0.gate_proj",
            "tuner.targets=[gate_proj,up_proj]",
        ),
        (
            r".*layers\.1\.mlp\.experts\.2\.down_proj",
            MOE,
            "takes 1 of the 4 experts' down_proj in layer 1, first mlp.experts.2.down_proj",
            "tuner.targets=[down_proj]",
        ),
    ],
)
def test_targets_that_match_nothing(targets: str | list[str], spec: ModelSpec, message: str, hint: str) -> None:
    with pytest.raises(names.TargetError) as caught:
        names.resolve_targets(targets, spec)
    assert message in str(caught.value)
    assert hint in caught.value.hint
