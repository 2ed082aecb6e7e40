"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import (
    ATTENTION,
    NORMS,
    QK_NORMS,
    Family,
    check_activation,
    decoder,
    every_layer,
    experts,
    refuse,
    router_loss,
)
from parallel.specs import ModelSpec, SpecError


def _read(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, "attention_bias")
    check_activation(config, "hidden_act", "silu")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise SpecError("a mixture of experts with dense layers in between is not supported yet")
    return ModelSpec(
        **decoder(config, {"num_key_value_heads": 4}),
        qk_norm=True,
        windows=_windows(config),
        experts=_experts(config),
        experts_per_token=int(config["num_experts_per_tok"]),
        expert_ffn=int(config["moe_intermediate_size"]),
        normalise_expert_weights=bool(config.get("norm_topk_prob", False)),
        router_aux_loss=router_loss(config),
    )


def _windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """In all layers, where there are any: ``max_window_layers`` is Qwen3's, not Qwen3-MoE's."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return int(config["num_hidden_layers"]) * (int(window),) if window else ()


def _experts(config: Mapping[str, Any]) -> int:
    """transformers 5 writes ``num_local_experts`` where older versions, and the hub's files, say ``num_experts``."""
    return int(config["num_local_experts"] if "num_local_experts" in config else config["num_experts"])


EXPERTS = experts("mlp", gate="gate_proj", up="up_proj", down="down_proj")
FAMILY = Family("qwen3_moe", _read, every_layer(NORMS + QK_NORMS, ATTENTION + EXPERTS))
