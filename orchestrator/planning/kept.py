"""Kept: what isotrain's own layers leave for the backward pass, tensor by tensor, as their modules keep it.

The method is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4): what lies between the cut linears is
divided by tp, the rest only under sequence parallelism. The terms are those of ``parallel/fused.py``,
``fused_attention.py``, ``lora.py``, ``dora.py``, ``context_attention.py`` and of megatron-core's mixture of experts;
``tests/distributed/test_held_memory.py`` holds them to 3 % of what autograd keeps. Experts are taken to get equal
shares of the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel import names
from parallel.families.family import Linear
from parallel.specs import ModelSpec

FULL_PRECISION = 4
MAGNITUDES = 2 * FULL_PRECISION + 1
"""Bytes of a row of DoRA's: its length, its factor, and whether it is adapted."""
INDEX = 8
"""Bytes of a position in a tensor: torch's int64."""


@dataclass(frozen=True)
class Kept:
    """Bytes: for each token of a micro-batch on a rank, for each position of a row on it, and for each micro-batch."""

    per_token: float = 0.0
    per_position: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.per_token + other.per_token, self.per_position + other.per_position, self.fixed + other.fixed)

    def __mul__(self, times: float) -> Kept:
        return Kept(self.per_token * times, self.per_position * times, self.fixed * times)

    def bytes(self, tokens: float, positions: float) -> float:
        """Of a micro-batch of ``tokens`` on a rank, in rows of ``positions`` there."""
        return self.per_token * tokens + self.per_position * positions + self.fixed


@dataclass(frozen=True)
class StageKept:
    """One rank of a stage, of one micro-batch. ``layers``: all of them, by recompute ``none`` and ``selective``.

    ``inputs``: of all layers, which is what full recompute keeps; ``largest``: the layer that keeps most while it
    reruns, without its input. ``start``: before the layers; ``finish``: after them, for the last micro-batch alone.
    """

    layers: dict[str, Kept]
    inputs: Kept
    largest: Kept
    start: Kept
    finish: Kept


@dataclass(frozen=True)
class Cut:
    """How a rank's layers are cut, and what learns in them.

    ``is_full``: every weight learns. ``adapted``: paths of linears with an adapter of ``rank``, PiSSA's fixed half
    counted. ``magnitudes``: DoRA's.
    """

    tp: int
    etp: int
    ep: int
    cp: int
    cp_comm: str
    sp: bool
    value_bytes: int
    device: str
    is_full: bool
    adapted: frozenset[str]
    rank: int
    magnitudes: bool

    @property
    def share(self) -> float:
        """Of the tokens between blocks: each tensor-parallel rank has its own under sequence parallelism."""
        return 1 / self.tp if self.sp else 1.0


def layer_kept(model: ModelSpec, cut: Cut, layer: int, recompute: str = "none") -> Kept:
    """What one layer keeps for one micro-batch."""
    value, hidden = cut.value_bytes, model.hidden
    norms = (4 if model.sandwich_norms else 2) * (hidden * value + FULL_PRECISION) * cut.share
    offsets = (4 if model.sandwich_norms else 2) * hidden * FULL_PRECISION if model.norm_offset else 0
    attend = _latent_attention if model.latent else _attention
    total = Kept(norms, fixed=offsets) + attend(model, cut, layer, recompute)
    linears = names.layer_names(model, layer).linears
    if model.has_experts(layer):
        total += _experts(model, cut, linears, layer)
    else:
        total += _activation(model, cut, model.ffn / cut.tp)
    for linear in linears:
        if not linear.expert:
            total += _linear(model, cut, linear, layer)
    total += Kept(_inputs(model, cut, linears, layer))
    return total


def layer_input(model: ModelSpec, cut: Cut) -> Kept:
    """A layer's input, which is all that full recompute keeps of it."""
    return Kept(model.hidden * cut.value_bytes * cut.share)


def first_norm(model: ModelSpec, cut: Cut) -> Kept:
    """What the norm of the first layer does not keep where nothing before it learns."""
    return Kept((model.hidden * cut.value_bytes + FULL_PRECISION) * cut.share)


def embedding_kept(model: ModelSpec, cut: Cut) -> Kept:
    """Which rows an embedding that learns has to add gradients to, and which of them are another rank's.

    Of its adapter the same, what A gives, and B; for DoRA what is stretched and by how much.
    """
    if cut.is_full:
        return Kept(INDEX + (cut.tp > 1))
    if names.EMBEDDING_MODULE not in cut.adapted:
        return Kept()
    wide = cut.rank * FULL_PRECISION
    found = Kept(INDEX + 1 + wide * cut.share, fixed=wide * model.hidden)
    stretched = Kept(model.hidden * cut.value_bytes * cut.share, fixed=2 * FULL_PRECISION * model.hidden)
    return found + stretched if cut.magnitudes else found


def finish_kept(model: ModelSpec, cut: Cut) -> Kept:
    """The final norm's, and which tokens have a label; of the head's adapter its input, A, and DoRA's magnitudes. The
    logits are the loss's own."""
    found = Kept((model.hidden * cut.value_bytes + FULL_PRECISION) * cut.share + 1)
    if names.HEAD_MODULE not in cut.adapted:
        return found
    rows = model.vocab / cut.tp * (FULL_PRECISION + 1) if cut.magnitudes else 0
    return found + Kept(
        model.hidden * cut.value_bytes * cut.share, fixed=cut.rank * model.hidden * cut.value_bytes + rows
    )


def angles(model: ModelSpec) -> Kept:
    """Rotary angles, which full recompute keeps once for all layers."""
    return Kept(per_position=model.head_dim * FULL_PRECISION)


def _learns(cut: Cut, linear: Linear, layer: int) -> list[str]:
    """Roles of a linear that have an adapter."""
    prefix = names.layer_prefix(layer)
    return [role for role, path in linear.parts if prefix + path.format(expert=0) in cut.adapted]


def _needs_input(cut: Cut, linear: Linear, layer: int) -> bool:
    return cut.is_full or bool(_learns(cut, linear, layer))


def _inputs(model: ModelSpec, cut: Cut, linears: tuple[Linear, ...], layer: int) -> float:
    """Inputs of linears whose weights or adapters learn, each once: two normed hidden states, and what fc2 takes."""
    value, hidden = cut.value_bytes, model.hidden
    attends = {linear.path for linear in linears if linear.path.startswith("self_attention.")}
    found = 0.0
    before = [one for one in linears if one.path in attends and not one.path.endswith(("_up", "_proj"))]
    if any(_needs_input(cut, linear, layer) for linear in before):
        found += hidden * value * cut.share
    behind = [one for one in linears if one.path not in attends and not one.expert and one.cut != "row"]
    # megatron-core's router keeps its input whether or not it learns
    if model.has_experts(layer) or any(_needs_input(cut, linear, layer) for linear in behind):
        found += hidden * value * cut.share
    for linear in linears:
        if linear.path not in attends and linear.cut == "row" and not linear.expert:
            found += names.shape(linear.parts[0][0], model)[1] / cut.tp * value * _needs_input(cut, linear, layer)
    return found


def _linear(model: ModelSpec, cut: Cut, linear: Linear, layer: int) -> Kept:
    """The adapter of a fused linear: ``A x``, both joined halves, and for DoRA what is stretched and by how much."""
    roles = _learns(cut, linear, layer)
    if not roles:
        return Kept()
    value, tokens = cut.value_bytes, 1.0 if linear.cut == "column" else cut.share
    columns, rows = (cut.tp if linear.cut == kind else 1 for kind in ("column", "row"))
    out = sum(names.shape(role, model)[0] for role, _ in linear.parts) / columns
    width = names.shape(linear.parts[0][0], model)[1] / rows
    low = len(roles) * cut.rank
    found = Kept(low * value * tokens, fixed=low * (out + width) * value)
    if cut.magnitudes:
        found += Kept(out * value * tokens, fixed=out * MAGNITUDES)
    return found


def _attention(model: ModelSpec, cut: Cut, layer: int, recompute: str) -> Kept:
    """Between the fused q|k|v and the input of the output linear, that included.

    A value is a view into the fused output, and keeps all of it. torch's kernel for whole rows takes repeated keys and
    values. Where an output is in the order of tokens it is the output linear's input, elsewhere that is a copy.
    """
    value, heads, groups = cut.value_bytes, model.heads / cut.tp, model.kv_heads / cut.tp
    query, key = heads * model.head_dim * value, groups * model.head_dim * value
    fused, lse = query + 2 * key, heads * FULL_PRECISION
    row = names.layer_names(model, layer).linears
    proj = query * any(_needs_input(cut, one, layer) for one in row if one.path == "self_attention.linear_proj")
    if _is_fused(model, cut, layer, recompute):
        return Kept(query + key + fused + proj, model.head_dim * value)
    normed = (heads + groups) * FULL_PRECISION if model.qk_norm else 0.0
    repeats, windowed = model.heads > model.kv_heads, bool(model.window(layer) or model.score_cap)
    turns = 4 * model.head_dim * value
    if model.qk_norm:
        normed += query if repeats else 0.0
    if recompute == "selective":
        return Kept(query + key + fused + normed + proj, turns)
    if cut.cp > 1 and cut.cp_comm == "ulysses":
        dealt = query + 2 * math.lcm(int(groups), cut.cp) * model.head_dim * value
        views = fused if model.qk_norm else 0.0
        return Kept(dealt + query + lse + normed + views + proj, turns)
    if cut.cp > 1:
        return Kept(query + key + fused + query + lse + normed, turns)
    if repeats and not windowed:
        return Kept(4 * query + lse + normed + (fused if model.qk_norm else 0.0), turns)
    return Kept(query + key + fused + query + lse + normed, turns)


def _latent_attention(model: ModelSpec, cut: Cut, layer: int, recompute: str) -> Kept:
    """The same of ``parallel/provider_latent.py``.

    Compressed queries, keys and values before and after their norm, which every tensor-parallel rank has whole;
    queries, keys and values padded to one width, with the output; cosines and sines of the turned features. Under
    selective recompute they are not padded, and values are a view that keeps what they were made with.
    """
    latent = model.latent
    assert latent is not None
    value, heads = cut.value_bytes, model.heads / cut.tp
    need = {
        one.path.removeprefix("self_attention.linear_"): _needs_input(cut, one, layer)
        for one in names.layer_names(model, layer).linears
    }
    found = ((latent.latent_rank + latent.rotary_dim) * value + FULL_PRECISION) * cut.share
    found += latent.latent_rank * value * cut.share * need["kv_up"]
    if latent.query_rank:
        found += (latent.query_rank * value + FULL_PRECISION) * cut.share
        found += latent.query_rank * value * cut.share * need["q_up"]
    found += heads * latent.value_dim * value * need["proj"]
    if recompute == "selective":
        found += heads * (2 * latent.key_dim + latent.plain_dim + latent.value_dim) * value
    else:
        found += heads * (4 * model.attended_dim * value + FULL_PRECISION)
    return Kept(found, 2 * latent.rotary_dim * FULL_PRECISION)


def _is_fused(model: ModelSpec, cut: Cut, layer: int, recompute: str) -> bool:
    """Whether ``parallel.fused_attention`` does it."""
    plain = not (model.qk_norm or model.window(layer) or model.score_cap or model.score_scale or model.latent)
    return plain and cut.device == "cpu" and cut.cp == 1 and recompute != "selective"


def _activation(model: ModelSpec, cut: Cut, ffn: float) -> Kept:
    """The gate and what it gates; of GeGLU, which is not one kernel, the activated gate too."""
    return Kept((2 if model.activation == "silu" else 3) * ffn * cut.value_bytes)


def _experts(model: ModelSpec, cut: Cut, linears: tuple[Linear, ...], layer: int) -> Kept:
    """A mixture of experts: tokens sorted by expert, activations weighted by the router, the router's own; shared ones.

    Of a token's copies: gate|up, activation, weighted activation where fc2 learns, input where fc1 learns, weight. Of a
    token: the choice as a mask, scores by expert, and where each copy comes from.
    """
    value, copies = cut.value_bytes, model.experts_per_token
    ffn, low = model.expert_ffn / cut.etp, 0.0
    up, down = (next(one for one in linears if one.expert and one.cut == kind) for kind in ("column", "row"))
    row = 3 * ffn * value + FULL_PRECISION
    row += model.hidden * value if _needs_input(cut, up, layer) else 0.0
    row += ffn * value if _needs_input(cut, down, layer) else 0.0
    fixed = 0.0
    for linear in (up, down):
        low = len(_learns(cut, linear, layer)) * cut.rank
        sizes = [names.shape(role, model) for role, _ in linear.parts]
        out = sum(size[0] for size in sizes) / (cut.etp if linear.cut == "column" else 1)
        width = sizes[0][1] / (cut.etp if linear.cut == "row" else 1)
        row += low * value
        fixed += low * (out + width) * value * (model.experts // cut.ep)
        if cut.magnitudes and low:
            row += out * value
            fixed += out * MAGNITUDES * (model.experts // cut.ep)
    spread = cut.share * cut.etp
    chosen = model.experts * (1 + FULL_PRECISION) + copies * (2 * INDEX + FULL_PRECISION)
    found = Kept(copies * row * spread + chosen * cut.share, fixed=fixed)
    return found + _activation(model, cut, model.shared_ffn / cut.tp) if model.shared_ffn else found
