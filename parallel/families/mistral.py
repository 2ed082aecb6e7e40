"""Mistral: a Llama whose queries may see a sliding window only (arXiv:2310.06825, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import ATTENTION, MLP, NORMS, Family, check_activation, decoder, every_layer
from parallel.specs import ModelSpec


def _read(config: Mapping[str, Any]) -> ModelSpec:
    check_activation(config, "hidden_act", "silu")
    window = config.get("sliding_window", 4096)  # what transformers takes where the config does not say
    fields = decoder(config, {"num_key_value_heads": 8})
    return ModelSpec(**fields, windows=fields["layers"] * (int(window),) if window else ())


FAMILY = Family("mistral", _read, every_layer(NORMS, ATTENTION + MLP))
