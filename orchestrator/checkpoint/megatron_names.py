"""How megatron-core's own checkpoints name a model's tensors, and which logical (Hugging Face) ones are in each.

In a ``torch_dist`` checkpoint a tensor is whole, with the rows of fused linears as megatron-core orders them. Layers
(and experts within them) lie on leading axes of one tensor, or have numbers in their keys, as newer versions write it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from parallel import names
from parallel.shards import Box, Piece
from parallel.specs import ModelSpec, SpecError

LAYERS, EXPERTS = "decoder.layers.", "mlp.experts."
FAMILIES_THERE = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
# transformer-engine fuses these norms into the linear after them; without it they have modules of their own.
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
HALVES = {"gate": "_w", "up": "_v"}  # where gate and up are stored apart


@dataclass(frozen=True)
class Axis:
    """One of ``count`` layers, or experts."""

    index: int
    count: int


@dataclass(frozen=True)
class Whole:
    """A tensor of megatron-core's model, not cut, of one layer and one expert (None: of none).

    Args:
        paths: its names below the layer, or in the model; the first is the one that transformer-engine's layers have.
        shape: without the axes of layers and experts.
        pieces: the logical tensors in it; ``local`` is the box in it.
        padded: it may have more rows, which pad the vocabulary.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    layer: Axis | None = None
    expert: Axis | None = None
    padded: bool = False


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored: under ``key``, at one index of each of its first ``axes``."""

    key: str
    axes: tuple[Axis, ...] = ()

    @property
    def lead(self) -> tuple[int, ...]:
        """The index on each of the first axes."""
        return tuple(axis.index for axis in self.axes)

    @property
    def counts(self) -> tuple[int, ...]:
        """The sizes of the first axes."""
        return tuple(axis.count for axis in self.axes)


def wholes(spec: ModelSpec) -> Iterator[Whole]:
    """All tensors of a model, from the embedding to the head.

    Raises:
        SpecError: megatron-core has no layers like this family's, or others' names for them are not proven here.
    """
    if spec.family not in FAMILIES_THERE:
        raise SpecError(
            f"torch_dist is known for {', '.join(FAMILIES_THERE)}, not for {spec.family}",
            "isotrain export DIR --to merged OUT  (a Hugging Face folder)",
        )
    table = (spec.vocab, spec.hidden)
    yield Whole(("embedding.word_embeddings.weight",), table, (names.whole_piece(names.EMBEDDING, table),), padded=True)
    for layer in range(spec.layers):
        yield from _layer(spec, layer)
    norm = (spec.hidden,)
    yield Whole(("decoder.final_layernorm.weight",), norm, (names.whole_piece(names.FINAL_NORM, norm),))
    if not spec.tied_embeddings:
        yield Whole(("output_layer.weight",), table, (names.whole_piece(names.HEAD, table),), padded=True)


def _layer(spec: ModelSpec, layer: int) -> Iterator[Whole]:
    here = Axis(layer, spec.layers)
    for path, name in names.layer_names(spec, layer).norms:
        shape = (names.norm_width(name, spec),)
        fused = FUSED_NORMS.get(path)
        paths = (path,) if fused is None else (fused, path)
        if spec.is_moe and path.startswith("pre_mlp"):  # the norm before a router is fused into nothing
            paths = paths[::-1]
        yield Whole(paths, shape, (names.whole_piece(names.layer_prefix(layer) + name, shape),), here)
    for linear in names.linears(spec, layer):
        path, expert = linear.path, None
        if linear.expert:
            _, _, rest = linear.path.partition("local_experts.")
            number, _, leaf = rest.partition(".")
            path, expert = f"{EXPERTS}experts.{leaf}", Axis(int(number), spec.experts)
        pieces = tuple(names.weight_pieces(linear, spec, layer, 1, 0))
        yield Whole((f"{path}.weight",), _hull(pieces), pieces, here, expert)
        if spec.qkv_bias and path == "self_attention.linear_qkv":
            pieces = tuple(names.bias_pieces(linear, spec, layer, 1, 0))
            yield Whole((f"{path}.bias",), _hull(pieces), pieces, here)


def _hull(pieces: tuple[Piece, ...]) -> tuple[int, ...]:
    """The shape of the tensor that these pieces fill."""
    ends = [tuple(a + b for a, b in zip(piece.local.offset, piece.local.size, strict=True)) for piece in pieces]
    return tuple(map(max, zip(*ends, strict=True)))


def stored_place(whole: Whole) -> Place:
    """Where we store a tensor: on axes of layers and experts, which every version of megatron-core reads.

    Example:
        >>> fc2 = Whole(("mlp.experts.experts.linear_fc2.weight",), (4, 8), (), Axis(2, 4), Axis(5, 8))
        >>> stored_place(fc2).key, stored_place(fc2).lead, stored_place(fc2).counts
        ('decoder.layers.mlp.experts.experts.linear_fc2.weight', (2, 5), (4, 8))
    """
    return next(_candidates(whole, whole.paths[0]))


def find_places(whole: Whole, keys: Collection[str]) -> tuple[tuple[Place, Whole], ...]:
    """Where a tensor lies among the keys of a checkpoint, in whichever way it was written; empty where it is not.

    One place, or two where gate and up are stored apart: then each comes with the part of ``whole`` that it holds.
    """
    for path in whole.paths:
        for place in _candidates(whole, path):
            if place.key in keys:
                return ((place, whole),)
            halves = [Place(place.key + suffix, place.axes) for suffix in HALVES.values()]
            if all(half.key in keys for half in halves):
                return tuple(zip(halves, _parted(whole), strict=True))
    return ()


def _candidates(whole: Whole, path: str) -> Iterator[Place]:
    if whole.layer is None:
        yield Place(path)
        return
    numbered = f"{LAYERS}{whole.layer.index}."
    if whole.expert is None:
        yield Place(LAYERS + path, (whole.layer,))
        yield Place(numbered + path)
        return
    one = path.replace("experts.experts.", f"experts.experts.{whole.expert.index}.")
    yield Place(LAYERS + path, (whole.layer, whole.expert))
    yield Place(numbered + path, (whole.expert,))
    yield Place(numbered + one)


def _parted(whole: Whole) -> Iterator[Whole]:
    """Gate and up, each as a tensor of its own."""
    for piece in whole.pieces:
        alone = Piece(piece.name, piece.shape, piece.box, Box.whole(piece.box.size))
        yield Whole(whole.paths, piece.box.size, (alone,), whole.layer, whole.expert)
