"""What a family is made of: tables of names, and the parts of config.json that families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.specs import ModelSpec, RopeScaling, SpecError


@dataclass(frozen=True)
class Linear:
    """One local linear layer.

    Args:
        path: its module path inside a megatron-core layer.
        cut: ``column`` (output rows are cut over tp), ``row`` (input columns are) or ``whole`` (every tp rank has all).
        parts: logical linears fused in it, as ``(role, Hugging Face path inside the layer)``.
        expert: it belongs to one expert: cut over etp (not tp), and held by one ep rank.
    """

    path: str
    cut: str
    parts: tuple[tuple[str, str], ...]
    expert: bool = False

    @property
    def is_router(self) -> bool:
        """Whether it scores a layer's experts."""
        return self.parts[0][0] == "router"


@dataclass(frozen=True)
class LayerNames:
    """The tensors of one layer.

    Args:
        norms: ``(local parameter, logical name)`` of its norms, which every tensor-parallel rank holds whole.
        linears: its linear layers.
        fixed: ``(local parameter, logical name)`` of tensors that no gradient reaches; held whole too.
    """

    norms: tuple[tuple[str, str], ...]
    linears: tuple[Linear, ...]
    fixed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        name: its ``model_type``.
        read: makes its shape from ``config.json``; raises KeyError (a missing key) or SpecError.
        layer: the names of one layer, counted from 0.
    """

    name: str
    read: Callable[[Mapping[str, Any]], ModelSpec]
    layer: Callable[[ModelSpec, int], LayerNames]


def every_layer(norms: tuple[tuple[str, str], ...], linears: tuple[Linear, ...]) -> Callable[..., LayerNames]:
    """The names of a family whose layers are all alike."""
    names = LayerNames(norms, linears)
    return lambda spec, layer: names


NORMS = (
    ("input_layernorm.weight", "input_layernorm.weight"),
    ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)
QK_NORMS = (
    ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)
SANDWICH_NORMS = (
    ("input_layernorm.weight", "input_layernorm.weight"),
    ("self_attn_bda.norm.weight", "post_attention_layernorm.weight"),
    ("pre_mlp_layernorm.weight", "pre_feedforward_layernorm.weight"),
    ("mlp_bda.norm.weight", "post_feedforward_layernorm.weight"),
)
ATTENTION = (
    Linear(
        "self_attention.linear_qkv",
        "column",
        (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj")),
    ),
    Linear("self_attention.linear_proj", "row", (("o", "self_attn.o_proj"),)),
)
MLP = (
    Linear("mlp.linear_fc1", "column", (("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"))),
    Linear("mlp.linear_fc2", "row", (("down", "mlp.down_proj"),)),
)


def experts(module: str, gate: str, up: str, down: str) -> tuple[Linear, ...]:
    """The router and the experts of a layer, which a family's files have in ``module`` under these names."""
    path, local = f"{module}.experts.{{expert}}", "mlp.experts.local_experts.{expert}"
    return (
        Linear("mlp.router", "whole", (("router", f"{module}.gate"),)),
        Linear(
            f"{local}.linear_fc1",
            "column",
            (("expert_gate", f"{path}.{gate}"), ("expert_up", f"{path}.{up}")),
            expert=True,
        ),
        Linear(f"{local}.linear_fc2", "row", (("expert_down", f"{path}.{down}"),), expert=True),
    )


def decoder(
    config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, rope_key: str | None = None
) -> dict[str, Any]:
    """The fields of :class:`ModelSpec` that every family's ``config.json`` says in the same words.

    Args:
        defaults: what the family means where the config does not say, as transformers does.
        rope_key: which of several entries of ``rope_parameters`` holds the rotary embedding.
    Raises:
        KeyError: a key is missing.
        SpecError: weights are quantised, attention drops out, or rotary frequencies are stretched in a way that is not
            built.
    """
    refuse(config, "quantization_config", hint="dequantise the model first: its stored weights are codes")
    refuse(config, "attention_dropout", hint="set attention_dropout to 0 in config.json")
    config = {**(defaults or {}), **config}
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    rope = rope_parameters(config, rope_key)
    return {
        "family": config["model_type"],
        "layers": int(config["num_hidden_layers"]),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "ffn": int(config["intermediate_size"]),
        "vocab": int(config["vocab_size"]),
        "max_positions": int(config["max_position_embeddings"]),
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope_theta": float(rope.get("rope_theta") or 10000.0),
        "rope_scaling": _scaling(rope, config),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def refuse(config: Mapping[str, Any], *keys: str, hint: str = "") -> None:
    """Refuse what a family's config asks for by a key that is true, and that would be left out without a word."""
    for key in keys:
        if config.get(key):
            raise SpecError(f"a {config['model_type']} model with {key}={config[key]} is not supported yet", hint)


def check_activation(config: Mapping[str, Any], key: str, known: str) -> None:
    """Refuse an activation function that is not the family's."""
    if config.get(key, known) != known:
        raise SpecError(f"{key} {config[key]!r} is not supported ({known} is)")


def router_loss(config: Mapping[str, Any]) -> float:
    """transformers adds a balancing loss only where the config also asks for the router's logits."""
    return float(config.get("router_aux_loss_coef", 0.001)) if config.get("output_router_logits") else 0.0


def windows(config: Mapping[str, Any], sliding: Callable[[int], bool]) -> tuple[int, ...]:
    """The window of each layer: by ``layer_types``, or where there are none by ``sliding(layer)``.

    Example:
        >>> windows({"num_hidden_layers": 3, "sliding_window": 8}, lambda layer: layer % 2 == 0)
        (8, 0, 8)
        >>> windows({"num_hidden_layers": 3, "sliding_window": None}, lambda layer: True)
        ()
    """
    size = config.get("sliding_window")
    if not size:
        return ()
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or [
        "sliding_attention" if sliding(layer) else "full_attention" for layer in range(layers)
    ]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise SpecError(
            f"layer_types names {len(kinds)} layers{' of kind ' + ', '.join(unknown) if unknown else ''}, but "
            f"num_hidden_layers={layers}, each sliding_attention or full_attention"
        )
    return tuple(int(size) if kind == "sliding_attention" else 0 for kind in kinds)


def rope_parameters(config: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    """Transformers 5 writes ``rope_parameters``, earlier versions ``rope_theta`` and ``rope_scaling``."""
    nested = config.get("rope_parameters") or {}
    nested = nested.get(key) or {} if key in nested else nested
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {}), **nested}
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if part != 1:
        raise SpecError(f"partial_rotary_factor={part} is not supported: heads are turned whole")
    return rope


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    stated = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    positions = int(stated or config["max_position_embeddings"])
    if kind == "linear":
        return RopeScaling(kind, float(rope["factor"]))
    if kind == "llama3":
        slow, fast = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return RopeScaling(kind, float(rope["factor"]), positions, slow, fast)
    if kind == "yarn":
        factor = float(rope.get("factor") or config["max_position_embeddings"] / positions)
        slow, fast = float(rope.get("beta_slow") or 1), float(rope.get("beta_fast") or 32)
        score_factor = _yarn_temperature(rope, factor) ** 2  # of queries and of keys
        return RopeScaling(kind, factor, positions, slow, fast, bool(rope.get("truncate", True)), score_factor)
    raise SpecError(f"rope scaling {kind!r} is not supported (linear, llama3 and yarn are)")


def _yarn_temperature(rope: Mapping[str, Any], factor: float) -> float:
    """What cosine and sine are multiplied with (arXiv:2309.00071, equation 22, and transformers' keys for it)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(factor, float(rope["mscale"])) / temperature(factor, float(rope["mscale_all_dim"]))
    return temperature(factor)


def temperature(factor: float, scale: float = 1.0) -> float:
    """Yarn's temperature for rows ``factor`` times as long as first trained on.

    Example:
        >>> temperature(1.0), round(temperature(40.0, 0.707), 4)
        (1.0, 1.2608)
    """
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
