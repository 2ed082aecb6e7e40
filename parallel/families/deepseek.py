"""DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437): latent attention, shared experts, routers of their own.

The first layers have dense MLPs. V2 scores experts by softmax, V3 by sigmoid with a bias for the choice; both may
choose groups of experts first. What the files of V3 hold for predicting further tokens (``model.layers.61``) belongs to
no layer here, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import (
    MLP,
    NORMS,
    Family,
    LayerNames,
    Linear,
    check_activation,
    decoder,
    experts,
    refuse,
    rope_parameters,
    temperature,
)
from parallel.specs import LatentAttention, ModelSpec, Routing, SpecError

V2 = {
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "scoring_func": "softmax",
}
V3 = {
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_key_value_heads": 128,
}
LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


NULL_HAS_A_MEANING = ("q_lora_rank", "num_key_value_heads")  # elsewhere null is what is left out


def _stated(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in config.items() if value is not None or key in NULL_HAS_A_MEANING}
    return {**defaults, **LATENT, **given}


def _read_v2(config: Mapping[str, Any]) -> ModelSpec:
    stated = _stated(config, V2)
    refuse(stated, "mlp_bias", "norm_topk_prob", hint="transformers leaves it out for this model_type")
    methods = {"greedy": False, "group_limited_greedy": True}
    _check_known(stated, "topk_method", *methods)
    _check_known(stated, "scoring_func", "softmax")
    grouped = methods[stated["topk_method"]]
    routing = Routing(
        "softmax",
        groups=int(stated["n_group"]) if grouped else 1,
        chosen_groups=int(stated["topk_group"]) if grouped else 1,
        scale=float(stated["routed_scaling_factor"]),
    )
    return _model(stated, routing, interleaved=True)


def _read_v3(config: Mapping[str, Any]) -> ModelSpec:
    stated = _stated(config, V3)
    _check_known(stated, "topk_method", "noaux_tc")
    _check_known(stated, "scoring_func", "sigmoid")
    routing = Routing(
        "sigmoid",
        groups=int(stated["n_group"]),
        chosen_groups=int(stated["topk_group"]),
        best_of_group=2,
        bias=True,
        scale=float(stated["routed_scaling_factor"]),
    )
    return _model(stated, routing, interleaved=stated.get("rope_interleave", True) is not False)


def _model(config: Mapping[str, Any], routing: Routing, interleaved: bool) -> ModelSpec:
    """The shape that both have in common; every default is in ``config``."""
    refuse(config, "attention_bias")
    check_activation(config, "hidden_act", "silu")
    if config.get("moe_layer_freq", 1) != 1:
        raise SpecError(f"moe_layer_freq={config['moe_layer_freq']} is not supported: dense layers come first")
    fields = decoder(config)
    _check_sizes(config, routing, fields["heads"], fields["kv_heads"])
    latent = LatentAttention(
        query_rank=int(config["q_lora_rank"] or 0),
        latent_rank=int(config["kv_lora_rank"]),
        plain_dim=int(config["qk_nope_head_dim"]),
        rotary_dim=int(config["qk_rope_head_dim"]),
        value_dim=int(config["v_head_dim"]),
        interleaved=interleaved,
    )
    expert_ffn, dense = int(config["moe_intermediate_size"]), int(config["first_k_dense_replace"])
    has_experts = dense < fields["layers"]
    return ModelSpec(
        **{**fields, "head_dim": latent.rotary_dim},
        experts=int(config["n_routed_experts"]) if has_experts else 0,
        experts_per_token=int(config["num_experts_per_tok"]) if has_experts else 0,
        expert_ffn=expert_ffn if has_experts else 0,
        shared_ffn=expert_ffn * int(config["n_shared_experts"]) if has_experts else 0,
        dense_layers=dense if has_experts else 0,
        normalise_expert_weights=bool(config["norm_topk_prob"]),
        routing=routing if has_experts else None,
        latent=latent,
        score_scale=latent.key_dim**-0.5 * _sharpness(config, fields["rope_scaling"]),
    )


def _sharpness(config: Mapping[str, Any], scaling: Any) -> float:
    """What stretched rotary embeddings multiply all scores with, beside the rotary part's own temperature."""
    over_all = rope_parameters(config).get("mscale_all_dim") if scaling else None
    return temperature(scaling.factor, float(over_all)) ** 2 if over_all else 1.0


def _check_known(config: Mapping[str, Any], key: str, *known: str) -> None:
    if config[key] not in known:
        raise SpecError(f"{key}={config[key]} of a {config['model_type']} model is not supported ({', '.join(known)})")


def _check_sizes(config: Mapping[str, Any], routing: Routing, heads: int, kv_heads: int) -> None:
    """Refuse sizes that transformers' model cannot have either."""
    if heads != kv_heads:
        raise SpecError(f"latent attention has keys for each head, but num_key_value_heads={kv_heads}, heads={heads}")
    if not config["n_shared_experts"]:
        raise SpecError(f"a {config['model_type']} model without shared experts is not supported")
    members, left = divmod(int(config["n_routed_experts"]), routing.groups)
    if left or members < routing.best_of_group or routing.chosen_groups > routing.groups:
        raise SpecError(
            f"n_routed_experts={config['n_routed_experts']} cannot be routed in n_group={config['n_group']} equal "
            f"groups of which topk_group={config['topk_group']} are chosen by their best {routing.best_of_group}"
        )
    if int(config["num_experts_per_tok"]) > members * routing.chosen_groups:
        raise SpecError(
            f"num_experts_per_tok={config['num_experts_per_tok']} is more than the {members * routing.chosen_groups} "
            "experts of the chosen groups"
        )


def _layer(spec: ModelSpec, layer: int) -> LayerNames:
    assert spec.latent is not None
    has_latent_queries = bool(spec.latent.query_rank)
    norms = NORMS + (LATENT_NORMS if has_latent_queries else LATENT_NORMS[1:])
    attention = (*(LATENT_QUERIES if has_latent_queries else QUERIES), *KEYS_VALUES)
    if not spec.has_experts(layer):
        return LayerNames(norms, attention + MLP)
    assert spec.routing is not None
    return LayerNames(norms, attention + EXPERTS + SHARED, BIAS if spec.routing.bias else ())


LATENT_NORMS = (
    ("self_attention.q_layernorm.weight", "self_attn.q_a_layernorm.weight"),
    ("self_attention.kv_layernorm.weight", "self_attn.kv_a_layernorm.weight"),
)
QUERIES = (Linear("self_attention.linear_q", "column", (("latent_q", "self_attn.q_proj"),)),)
LATENT_QUERIES = (
    Linear("self_attention.linear_q_down", "whole", (("latent_q_down", "self_attn.q_a_proj"),)),
    Linear("self_attention.linear_q_up", "column", (("latent_q_up", "self_attn.q_b_proj"),)),
)
KEYS_VALUES = (
    Linear("self_attention.linear_kv_down", "whole", (("latent_kv_down", "self_attn.kv_a_proj_with_mqa"),)),
    Linear("self_attention.linear_kv_up", "column", (("latent_kv_up", "self_attn.kv_b_proj"),)),
    Linear("self_attention.linear_proj", "row", (("latent_o", "self_attn.o_proj"),)),
)
EXPERTS = experts("mlp", gate="gate_proj", up="up_proj", down="down_proj")
SHARED = (
    Linear(
        "mlp.shared_experts.linear_fc1",
        "column",
        (("shared_gate", "mlp.shared_experts.gate_proj"), ("shared_up", "mlp.shared_experts.up_proj")),
    ),
    Linear("mlp.shared_experts.linear_fc2", "row", (("shared_down", "mlp.shared_experts.down_proj"),)),
)
BIAS = (("mlp.router.choice_bias", "mlp.gate.e_score_correction_bias"),)
FAMILY_V2 = Family("deepseek_v2", _read_v2, _layer)
FAMILY_V3 = Family("deepseek_v3", _read_v3, _layer)
