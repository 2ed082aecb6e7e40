"""Names: how a rank's local tensors are made of logical (Hugging Face) ones, by the tables of :mod:`parallel.families`.

Everything that knows a tensor by its name (import, export, adapters, checkpoints) asks here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from parallel.families import FAMILIES
from parallel.families.family import LayerNames, Linear
from parallel.shards import Box, Piece
from parallel.specs import ModelSpec


class TargetError(ValueError):
    """``tuner.targets`` names nothing in this model."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


ADAPTER = "base_model.model."  # what PEFT puts before the names of a model's modules
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


HEAD_MODULE = HEAD.removesuffix(".weight")
HEAD_LINEAR = Linear("output_layer", "column", (("head", HEAD_MODULE),))  # of no layer
EMBEDDING_MODULE = EMBEDDING.removesuffix(".weight")


def layer_prefix(layer: int | None) -> str:
    """Where a layer's tensors live in a Hugging Face state dict; None: what is in no layer.

    Example:
        >>> layer_prefix(3), layer_prefix(None)
        ('model.layers.3.', '')
    """
    return "" if layer is None else f"model.layers.{layer}."


def layer_names(spec: ModelSpec, layer: int) -> LayerNames:
    """The tensors of one layer, counted from 0; linears of experts stand for those of all its experts."""
    return FAMILIES[spec.family].layer(spec, layer)


def linears(spec: ModelSpec, layer: int, ep: int = 1, ep_rank: int = 0) -> Iterator[Linear]:
    """The local linears of one layer; of experts, those that expert-parallel rank ``ep_rank`` of ``ep`` holds."""
    local_experts = spec.experts // ep
    for linear in layer_names(spec, layer).linears:
        if not linear.expert:
            yield linear
            continue
        for local in range(local_experts):
            expert = ep_rank * local_experts + local
            parts = tuple((role, path.format(expert=expert)) for role, path in linear.parts)
            yield Linear(linear.path.format(expert=local), linear.cut, parts, expert=True)


def shape(role: str, spec: ModelSpec) -> tuple[int, int]:
    """``(out, in)`` of the whole logical linear with this role."""
    if role.startswith("latent_"):
        return _latent_shape(role, spec)
    query, value = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return {
        "q": (query, spec.hidden),
        "k": (value, spec.hidden),
        "v": (value, spec.hidden),
        "o": (spec.hidden, query),
        "gate": (spec.ffn, spec.hidden),
        "up": (spec.ffn, spec.hidden),
        "down": (spec.hidden, spec.ffn),
        "router": (spec.experts, spec.hidden),
        "expert_gate": (spec.expert_ffn, spec.hidden),
        "expert_up": (spec.expert_ffn, spec.hidden),
        "expert_down": (spec.hidden, spec.expert_ffn),
        "shared_gate": (spec.shared_ffn, spec.hidden),
        "shared_up": (spec.shared_ffn, spec.hidden),
        "shared_down": (spec.hidden, spec.shared_ffn),
        "head": (spec.vocab, spec.hidden),
    }[role]


def _latent_shape(role: str, spec: ModelSpec) -> tuple[int, int]:
    latent = spec.latent
    assert latent is not None, f"{role} is a linear of latent attention"
    query = spec.heads * latent.key_dim
    return {
        "latent_q": (query, spec.hidden),
        "latent_q_down": (latent.query_rank, spec.hidden),
        "latent_q_up": (query, latent.query_rank),
        "latent_kv_down": (latent.latent_rank + latent.rotary_dim, spec.hidden),
        "latent_kv_up": (spec.heads * (latent.plain_dim + latent.value_dim), latent.latent_rank),
        "latent_o": (spec.hidden, spec.heads * latent.value_dim),
    }[role]


def norm_width(name: str, spec: ModelSpec) -> int:
    """Over how many features a layer's norm goes: the hidden size, a head or a latent."""
    module = name.split(".")[-2]
    if module in ("q_norm", "k_norm"):
        return spec.head_dim
    if spec.latent is None:
        return spec.hidden
    return {"q_a_layernorm": spec.latent.query_rank, "kv_a_layernorm": spec.latent.latent_rank}.get(module, spec.hidden)


def local_rows(role: str, spec: ModelSpec, tp: int, rank: int) -> Iterator[tuple[int, int, int]]:
    """Where the rows of a column-parallel part lie: ``(logical row, local row, count)``.

    megatron-core lays a fused qkv out group by group (the query heads of one key/value group, its key, its value), and
    a fused gate|up as this rank's gate rows, then its up rows. What is not fused lies as it is.
    """
    if role not in ("q", "k", "v"):
        count = shape(role, spec)[0] // tp
        yield rank * count, (count if role in ("up", "expert_up", "shared_up") else 0), count
        return
    queries = spec.heads // spec.kv_heads
    groups = spec.kv_heads // tp
    stride = (queries + 2) * spec.head_dim
    count = (queries if role == "q" else 1) * spec.head_dim
    inside = {"q": 0, "k": queries, "v": queries + 1}[role] * spec.head_dim
    for group in range(groups):
        yield (rank * groups + group) * count, group * stride + inside, count


def weight_pieces(linear: Linear, spec: ModelSpec, layer: int, tp: int, rank: int) -> Iterator[Piece]:
    """The logical pieces of a local weight ``[out, in]`` on tensor-parallel rank ``rank`` of ``tp``."""
    for role, path in linear.parts:
        name, whole = f"{layer_prefix(layer)}{path}.weight", shape(role, spec)
        if linear.cut == "whole":
            yield whole_piece(name, whole)
            continue
        if linear.cut == "row":
            size = (whole[0], whole[1] // tp)
            yield Piece(name, whole, Box((0, rank * size[1]), size), Box((0, 0), size))
            continue
        for logical, local, count in local_rows(role, spec, tp, rank):
            size = (count, whole[1])
            yield Piece(name, whole, Box((logical, 0), size), Box((local, 0), size))


def bias_pieces(linear: Linear, spec: ModelSpec, layer: int, tp: int, rank: int) -> Iterator[Piece]:
    """The logical pieces of a column-parallel linear's local bias ``[out]``."""
    for role, path in linear.parts:
        name, whole = f"{layer_prefix(layer)}{path}.bias", shape(role, spec)[:1]
        for logical, local, count in local_rows(role, spec, tp, rank):
            yield Piece(name, whole, Box((logical,), (count,)), Box((local,), (count,)))


def whole_piece(name: str, size: tuple[int, ...]) -> Piece:
    """The piece of a tensor that every tensor-parallel rank holds whole."""
    return Piece(name, size, Box.whole(size), Box.whole(size))


def vocab_piece(name: str, spec: ModelSpec, tp: int, rank: int) -> Piece:
    """This rank's rows of an embedding or head ``[vocab, hidden]``; padding rows are in no piece."""
    rows = padded_vocab(spec.vocab, tp) // tp
    start = rank * rows
    size = (max(0, min(rows, spec.vocab - start)), spec.hidden)
    return Piece(name, (spec.vocab, spec.hidden), Box((start, 0), size), Box((0, 0), size))


def padded_vocab(vocab: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of ``tp``.

    Example:
        >>> padded_vocab(10, 4)
        12
    """
    return -(-vocab // tp) * tp


def adapter_pieces(
    linear: Linear, part: tuple[str, str], spec: ModelSpec, layer: int | None, r: int, tp: int, rank: int
) -> tuple[Piece, Piece]:
    """The logical pieces of one part's local LoRA halves A ``[r, in]`` and B ``[out, r]``, under PEFT's names.

    Column-parallel: A is whole on every rank, B has this rank's rows. Row-parallel: A has this rank's columns, B is
    whole. A linear that is not cut has both whole. The rows of B are contiguous here, also where the base is fused.
    """
    role, path = part
    out, width = shape(role, spec)
    name = f"base_model.model.{layer_prefix(layer)}{path}"
    name_a, name_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    if linear.cut == "row":
        local = width // tp
        piece_a = Piece(name_a, (r, width), Box((0, rank * local), (r, local)), Box.whole((r, local)))
        return piece_a, whole_piece(name_b, (out, r))
    if linear.cut == "whole":
        return whole_piece(name_a, (r, width)), whole_piece(name_b, (out, r))
    start, local = rank * (out // tp), out // tp
    if role == "head":  # whose rows may not divide
        rows = vocab_piece(HEAD, spec, tp, rank).box
        start, local = rows.offset[0], rows.size[0]
    piece_b = Piece(name_b, (out, r), Box((start, 0), (local, r)), Box.whole((local, r)))
    return whole_piece(name_a, (r, width)), piece_b


def embedding_adapter_pieces(spec: ModelSpec, r: int, tp: int, rank: int) -> tuple[Piece, Piece]:
    """The pieces of the embedding's local LoRA halves A ``[r, vocab]`` (columns cut) and B ``[hidden, r]`` (whole)."""
    rows = vocab_piece(EMBEDDING, spec, tp, rank).box
    start, local = rows.offset[0], rows.size[0]
    name = f"{ADAPTER}{EMBEDDING_MODULE}.lora_embedding_"
    piece_a = Piece(f"{name}A", (r, spec.vocab), Box((0, start), (r, local)), Box.whole((r, local)))
    return piece_a, whole_piece(f"{name}B", (spec.hidden, r))


def embedding_magnitude_piece(spec: ModelSpec) -> Piece:
    """The piece of the embedding's DoRA magnitudes ``[hidden]``, one for each column, which every rank holds whole."""
    return whole_piece(f"{ADAPTER}{EMBEDDING_MODULE}.lora_magnitude_vector", (spec.hidden,))


def magnitude_piece(
    linear: Linear, part: tuple[str, str], spec: ModelSpec, layer: int | None, tp: int, rank: int
) -> Piece:
    """The piece of one part's local DoRA magnitudes ``[out]``, under PEFT's name: cut and laid as the rows of B are."""
    role, path = part
    out = shape(role, spec)[0]
    local, start = (out // tp, rank * (out // tp)) if linear.cut == "column" else (out, 0)
    if role == "head":
        rows = vocab_piece(HEAD, spec, tp, rank).box
        start, local = rows.offset[0], rows.size[0]
    name = f"base_model.model.{layer_prefix(layer)}{path}.lora_magnitude_vector"
    return Piece(name, (out,), Box((start,), (local,)), Box.whole((local,)))


def kinds_of_layers(spec: ModelSpec) -> list[int]:
    """The first layer of each kind: dense, with experts.

    Example:
        >>> kinds_of_layers(ModelSpec("llama", 4, 8, 2, 2, 4, 16, 32, 64, 1e-5, 1e4, True))
        [0]
    """
    first = {spec.has_experts(layer): layer for layer in reversed(range(spec.layers))}
    return sorted(first.values())


def leaf_names(spec: ModelSpec, experts: bool = True) -> list[str]:
    """The last parts of the paths of layers' linears, in their order; if asked without those that mean experts too.

    Example:
        >>> leaf_names(ModelSpec("llama", 1, 8, 2, 2, 4, 16, 32, 64, 1e-5, 1e4, True))[:3]
        ['q_proj', 'k_proj', 'v_proj']
    """
    found: dict[str, bool] = {}  # whether experts or the router go by this name too
    for layer in kinds_of_layers(spec):
        for linear in layer_names(spec, layer).linears:
            for _, path in linear.parts:
                leaf = path.rpartition(".")[2]
                found[leaf] = found.get(leaf, False) or linear.expert or linear.is_router
    return [leaf for leaf, is_experts in found.items() if experts or not is_experts]


def target_modules(spec: ModelSpec) -> list[str]:
    """Every logical linear of the layers, as a full module path, in layer order."""
    return [
        layer_prefix(layer) + path
        for layer in range(spec.layers)
        for linear in linears(spec, layer)
        for _, path in linear.parts
    ]


def quantised_weights(spec: ModelSpec) -> list[str]:
    """The weights that a quantised base has in 4 bits: all linears of the layers but the routers, which decide by small
    differences."""
    return [
        f"{layer_prefix(layer)}{path}.weight"
        for layer in range(spec.layers)
        for linear in linears(spec, layer)
        if not linear.is_router
        for _, path in linear.parts
    ]


def adaptable_modules(spec: ModelSpec) -> list[str]:
    """Every module that can carry an adapter: the layers' linears, the embedding, and a head of its own."""
    return target_modules(spec) + [EMBEDDING_MODULE] + ([] if spec.tied_embeddings else [HEAD_MODULE])


def resolve_targets(targets: str | list[str], spec: ModelSpec) -> frozenset[str]:
    """Which logical linears an adapter sits on, by PEFT's rules for ``target_modules``.

    A list (or one plain name) matches a module by its last path components; a string is a regular expression that must
    match the whole module path; ``all-linear`` means every linear layer but the output layer. With experts PEFT trains
    one joint adapter of gate and up by it, whose B is dense over both; here each has its own, so it is refused. Of a
    layer's experts all are adapted or none, and gate and up together, because PEFT holds them as one tensor.

    Returns:
        Full module paths such as ``model.layers.0.self_attn.q_proj`` or ``model.layers.0.mlp.experts.3.up_proj``.
    Raises:
        TargetError: a name matches nothing, and the message lists near names; or part of a layer's experts.
    """
    modules = adaptable_modules(spec)
    if targets == "all-linear" and spec.is_moe:
        raise TargetError(
            "tuner.targets=all-linear trains one dense adapter over gate and up of an expert in PEFT, which is not "
            "built; each has an adapter of its own when they are named",
            f"tuner.targets=[{','.join(leaf_names(spec))}]",
        )
    if targets == "all-linear":
        return frozenset(target_modules(spec))
    known = sorted({module.rpartition(".")[2] for module in modules})
    if isinstance(targets, str) and targets not in known:
        _check_head(targets, spec)
        return _whole_experts(_by_expression(targets, modules, known), spec)
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        found = {module for module in modules if module == target or module.endswith("." + target)}
        if not found:
            _check_head(target, spec)
            near = near_names(target, known)
            raise TargetError(
                f"tuner.targets: {target!r} matches no linear layer of this {spec.family} model",
                f"near names: {', '.join(near)}; for example tuner.targets=[{near[0]}] or tuner.targets=all-linear",
            )
        chosen |= found
    if not chosen:
        raise TargetError("tuner.targets is empty", "tuner.targets=all-linear")
    return _whole_experts(frozenset(chosen), spec)


def _whole_experts(chosen: frozenset[str], spec: ModelSpec) -> frozenset[str]:
    """Refuse targets that take some experts of a layer and leave others, or gate without up."""
    for layer in range(spec.layers):
        experts = [linear for linear in linears(spec, layer) if linear.expert]
        for cut in ("column", "row"):  # gate with up, and down
            paths = [path for linear in experts if linear.cut == cut for _, path in linear.parts]
            leaves = sorted({path.rsplit(".", 1)[1] for path in paths})
            found = [path for path in paths if layer_prefix(layer) + path in chosen]
            if found and len(found) < len(paths):
                raise TargetError(
                    f"tuner.targets takes {len(found)} of the {len(paths)} experts' {' and '.join(leaves)} in layer "
                    f"{layer}, first {found[0]}; PEFT holds these as one tensor: all or none",
                    f"tuner.targets=[{','.join(leaves)}]",
                )
    return chosen


def near_names(word: str, known: list[str]) -> list[str]:
    """Up to three names that look like ``word``; all where none does.

    Example:
        >>> near_names("q_prj", ["q_proj", "up_proj", "lm_head"])[0]
        'q_proj'
    """
    return difflib.get_close_matches(word, known, n=3, cutoff=0.3) or known


def _check_head(target: str, spec: ModelSpec) -> None:
    """Refuse a name or an expression that means a head which is the embedding."""
    try:
        chosen = re.fullmatch(target, HEAD_MODULE)
    except re.error:
        return
    if spec.tied_embeddings and chosen:
        raise TargetError(
            "tuner.targets: lm_head is the embedding in this model, and an adapter on one would change both",
            "tuner.modules_to_save=[embed_tokens]",
        )


def _by_expression(expression: str, modules: list[str], leaves: list[str]) -> frozenset[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise TargetError(
            f"tuner.targets: {expression!r} is no regular expression: {error}", "tuner.targets=all-linear"
        ) from error
    found = frozenset(module for module in modules if pattern.fullmatch(module))
    if not found:
        near = near_names(expression, leaves)
        raise TargetError(
            f"tuner.targets: {expression!r} matches no linear layer (a string must match the whole path, such as "
            f"{modules[0]})",
            f"near names: {', '.join(near)}; for example tuner.targets=[{near[0]}]",
        )
    return found
