"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import ATTENTION, MLP, NORMS, Family, check_activation, decoder, every_layer, windows
from parallel.specs import ModelSpec


def qwen_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Windows where ``use_sliding_window`` asks for them, from layer ``max_window_layers`` on."""
    if not config.get("use_sliding_window"):
        return ()
    stated = {"sliding_window": 4096, **config}
    return windows(stated, lambda layer: layer >= int(config.get("max_window_layers", 28)))


def _read(config: Mapping[str, Any]) -> ModelSpec:
    check_activation(config, "hidden_act", "silu")
    return ModelSpec(**decoder(config, {"num_key_value_heads": 32}), qkv_bias=True, windows=qwen_windows(config))


FAMILY = Family("qwen2", _read, every_layer(NORMS, ATTENTION + MLP))
