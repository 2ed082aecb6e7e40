"""Gemma 3's text models (arXiv:2503.19786): five layers with a window and a rotary base of their own, then one without.

Its models of more than 1B parameters see images too (``model_type`` gemma3); only the text models are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import ATTENTION, MLP, QK_NORMS, SANDWICH_NORMS, Family, every_layer, refuse, windows
from parallel.families.gemma2 import gemma_decoder
from parallel.specs import ModelSpec, SpecError

GLOBAL, LOCAL = "full_attention", "sliding_attention"
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0  # where the config does not say


def _read(config: Mapping[str, Any]) -> ModelSpec:
    refuse(config, "attn_logit_softcapping")
    stated = {"sliding_window": 4096, "rope_theta": GLOBAL_THETA, **config}
    fields = gemma_decoder(stated, rope_key=GLOBAL)
    if fields["rope_scaling"] and fields["rope_scaling"].score_factor != 1:
        raise SpecError("a gemma3_text model with yarn is not supported yet: its temperature is not every layer's")
    pattern = int(config.get("sliding_window_pattern", 6))
    return ModelSpec(
        **fields,
        qk_norm=True,
        windows=windows(stated, lambda layer: (layer + 1) % pattern != 0),
        local_rope_theta=_local_theta(config),
        logit_cap=float(config.get("final_logit_softcapping") or 0),
    )


def _local_theta(config: Mapping[str, Any]) -> float:
    local = (config.get("rope_parameters") or {}).get(LOCAL) or {}
    if local.get("rope_type", "default") != "default":
        raise SpecError(f"rope scaling {local['rope_type']!r} in layers with a window is not supported yet")
    return float(local.get("rope_theta") or config.get("rope_local_base_freq") or LOCAL_THETA)


FAMILY = Family("gemma3_text", _read, every_layer(SANDWICH_NORMS + QK_NORMS, ATTENTION + MLP))
