"""Gemma 2 (arXiv:2408.00118): sandwich norms, bounded scores and logits, a sliding window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families.family import (
    ATTENTION,
    MLP,
    SANDWICH_NORMS,
    Family,
    check_activation,
    decoder,
    every_layer,
    refuse,
    windows,
)
from parallel.specs import ModelSpec

ACTIVATION = "gelu_pytorch_tanh"


def gemma_decoder(config: Mapping[str, Any], rope_key: str | None = None) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common: norms times ``1 + weight``, scaled embeddings and queries, tied tables."""
    refuse(config, "attention_bias", "use_bidirectional_attention")
    check_activation(config, "hidden_activation", ACTIVATION)
    fields = decoder(config, {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}, rope_key)
    return {
        **fields,
        "activation": ACTIVATION,
        "norm_offset": True,
        "sandwich_norms": True,
        "embedding_scale": fields["hidden"] ** 0.5,
        "score_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
    }


def _read(config: Mapping[str, Any]) -> ModelSpec:
    stated = {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **config}
    return ModelSpec(
        **gemma_decoder(config),
        windows=windows(stated, lambda layer: layer % 2 == 0),
        score_cap=float(stated["attn_logit_softcapping"] or 0),
        logit_cap=float(stated["final_logit_softcapping"] or 0),
    )


FAMILY = Family("gemma2", _read, every_layer(SANDWICH_NORMS, ATTENTION + MLP))
