"""Qwen3: norms on queries and keys (arXiv:2505.09388, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import (
    ATTENTION,
    MLP,
    NORMS,
    QK_NORMS,
    Family,
    check_activation,
    decoder,
    every_layer,
    refuse,
)
from parallel.families.qwen2 import qwen_windows
from parallel.specs import ModelSpec


def _read(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, "attention_bias")
    check_activation(config, "hidden_act", "silu")
    return ModelSpec(
        **decoder(config, {"num_key_value_heads": 32, "head_dim": 128}), qk_norm=True, windows=qwen_windows(config)
    )


FAMILY = Family("qwen3", _read, every_layer(NORMS + QK_NORMS, ATTENTION + MLP))
