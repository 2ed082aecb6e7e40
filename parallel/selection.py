"""Weights chosen by patterns of their Hugging Face names: what full tuning freezes, and learning rates of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from parallel import names
from parallel.specs import ModelSpec


class SelectionError(names.TargetError):
    """A pattern chooses nothing, or a part of what cannot be parted; ``hint`` says what to type."""


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every weight of a model by its Hugging Face name, in layer order; a tied head is no weight of its own.

    Example:
        >>> tiny = ModelSpec("llama", 1, 8, 2, 2, 4, 16, 32, 64, 1e-5, 1e4, True)
        >>> list(weight_shapes(tiny))[-2:]
        ['model.layers.0.mlp.down_proj.weight', 'model.norm.weight']
    """
    shapes: dict[str, tuple[int, ...]] = {names.EMBEDDING: (spec.vocab, spec.hidden)}
    for layer in range(spec.layers):
        prefix = names.layer_prefix(layer)
        for _, name in names.layer_names(spec, layer).norms:
            shapes[prefix + name] = (names.norm_width(name, spec),)
        for group in _fused(spec, layer):
            for role, path in group:
                shapes[f"{prefix}{path}.weight"] = names.shape(role, spec)
                if spec.qkv_bias and role in ("q", "k", "v"):
                    shapes[f"{prefix}{path}.bias"] = names.shape(role, spec)[:1]
    shapes[names.FINAL_NORM] = (spec.hidden,)
    if not spec.tied_embeddings:
        shapes[names.HEAD] = (spec.vocab, spec.hidden)
    return shapes


def frozen_weights(patterns: Sequence[str], spec: ModelSpec) -> frozenset[str]:
    """The weights that ``tuner.freeze`` names.

    A pattern chooses a weight by the last path components of its module (``embed_tokens``, ``mlp.down_proj``) or as a
    regular expression that matches the whole name of the module or of the weight.

    Raises:
        SelectionError: a pattern chooses nothing, all weights are chosen, or some parts of a linear that is one
            tensor here (q|k|v, gate|up).
    Example:
        >>> tiny = ModelSpec("llama", 1, 8, 2, 2, 4, 16, 32, 64, 1e-5, 1e4, True)
        >>> sorted(frozen_weights(["embed_tokens", ".*norm"], tiny))[:2]
        ['model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight']
    """
    if not patterns:
        return frozenset()
    chosen = {name: 1.0 for pattern in patterns for name in _chosen(pattern, spec, "tuner.freeze")}
    if len(chosen) == len(weight_shapes(spec)):
        raise SelectionError(f"tuner.freeze={list(patterns)} leaves nothing to train", "tuner.freeze=[embed_tokens]")
    _check_fused(chosen, spec, "tuner.freeze")
    return frozenset(chosen)


def saved_weights(modules: Sequence[str], spec: ModelSpec) -> frozenset[str]:
    """The weights that ``tuner.modules_to_save`` names: embedding, head and norms may learn whole beside an adapter.

    As in PEFT a name chooses every module whose path ends with it: ``norm`` chooses ``input_layernorm`` too. A tied
    head is the embedding.

    Raises:
        SelectionError: a name chooses nothing, or a linear of a layer.
    Example:
        >>> tiny = ModelSpec("llama", 1, 8, 2, 2, 4, 16, 32, 64, 1e-5, 1e4, True)
        >>> sorted(saved_weights(["embed_tokens"], tiny))
        ['model.embed_tokens.weight']
    """
    chosen: set[str] = set()
    for module in modules:
        found = {name for name in weight_shapes(spec) if name.rpartition(".")[0].endswith(module)}
        if not found:
            tied = spec.tied_embeddings and module == "lm_head"
            raise SelectionError(
                f"tuner.modules_to_save: {module!r} matches no weight of its own of this {spec.family} model"
                + (": its head is its embedding" if tied else ""),
                "tuner.modules_to_save=[embed_tokens]",
            )
        chosen |= found
    linears = sorted(chosen & {f"{path}.weight" for path in names.target_modules(spec)})
    if linears:
        raise SelectionError(
            f"tuner.modules_to_save chooses {len(linears)} linears, first {linears[0]}: they learn by an adapter",
            "tuner.modules_to_save=[embed_tokens]",
        )
    return frozenset(chosen)


def rate_ratios(patterns: Mapping[str, float], spec: ModelSpec) -> dict[str, float]:
    """Weights with a learning rate of their own, in units of the run's; of several patterns the last counts.

    Raises:
        SelectionError: as :func:`frozen_weights`.
    """
    chosen = {
        name: float(ratio)
        for pattern, ratio in patterns.items()
        for name in _chosen(pattern, spec, "optimizer.lr_ratios")
    }
    if chosen:
        _check_fused(chosen, spec, "optimizer.lr_ratios")
    return chosen


def _chosen(pattern: str, spec: ModelSpec, key: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise SelectionError(f"{key}: {pattern!r} is no regular expression: {error}", "embed_tokens") from error
    every = list(weight_shapes(spec))
    found = []
    for name in every:
        module = name.rpartition(".")[0]
        if f".{module}".endswith(f".{pattern}") or expression.fullmatch(module) or expression.fullmatch(name):
            found.append(name)
    if not found:
        leaves = sorted({name.split(".")[-2] for name in every})
        near = names.near_names(pattern, leaves)
        raise SelectionError(
            f"{key}: {pattern!r} matches no weight of this {spec.family} model (a regular expression must match the "
            f"whole name, such as {every[1]})",
            f"near names: {', '.join(near)}",
        )
    return found


def _check_fused(chosen: Mapping[str, float], spec: ModelSpec, key: str) -> None:
    """Parts of one local tensor share what the optimizer does with it."""
    for layer in range(spec.layers):
        for group in _fused(spec, layer):
            for kind in ("weight", "bias"):
                values = {path: chosen.get(f"{names.layer_prefix(layer)}{path}.{kind}") for _, path in group}
                if len(set(values.values())) == 1:
                    continue
                leaves = [path.rpartition(".")[2] for path in values]
                some = ", ".join(leaf for leaf, value in zip(leaves, values.values(), strict=True) if value is not None)
                raise SelectionError(
                    f"{key}: {', '.join(leaves)} of layer {layer} are one tensor here, and only {some} is chosen alone",
                    f"choose {', '.join(leaves)} together, or none of them",
                )


def _fused(spec: ModelSpec, layer: int) -> Iterator[tuple[tuple[str, str], ...]]:
    """For each local linear of a layer its logical parts as ``(role, path)``."""
    for linear in names.linears(spec, layer):
        yield linear.parts
