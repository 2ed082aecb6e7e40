"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer.

Names are those of the hub's files, which transformers 5 and PEFT read and write too: ``block_sparse_moe.gate``, and of
each expert ``w1`` (gate), ``w3`` (up) and ``w2`` (down).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import (
    ATTENTION,
    NORMS,
    Family,
    check_activation,
    decoder,
    every_layer,
    experts,
    refuse,
    router_loss,
)
from parallel.specs import ModelSpec

DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, "router_jitter_noise")
    check_activation(config, "hidden_act", "silu")
    fields = decoder(config, DEFAULTS)
    window = config.get("sliding_window")
    return ModelSpec(
        **fields,
        windows=fields["layers"] * (int(window),) if window else (),
        experts=int(config["num_local_experts"]),
        experts_per_token=int(config["num_experts_per_tok"]),
        expert_ffn=fields["ffn"],
        router_aux_loss=router_loss(config),
    )


EXPERTS = experts("block_sparse_moe", gate="w1", up="w3", down="w2")
FAMILY = Family("mixtral", _read, every_layer(NORMS, ATTENTION + EXPERTS))
