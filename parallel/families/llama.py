"""Llama 2 and 3, and what has their shape (SmolLM2, TinyLlama): plain rotary embeddings, or stretched ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import ATTENTION, MLP, NORMS, Family, check_activation, decoder, every_layer, refuse
from parallel.specs import ModelSpec


def _read(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, "attention_bias", "mlp_bias")
    check_activation(config, "hidden_act", "silu")
    return ModelSpec(**decoder(config))


FAMILY = Family("llama", _read, every_layer(NORMS, ATTENTION + MLP))
