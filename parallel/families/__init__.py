"""Model families: one file each, with how its config.json is read and how its layers are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.families import deepseek, gemma2, gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from parallel.families.family import Family
from parallel.specs import ModelSpec, SpecError

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY),
        *(mixtral.FAMILY, gemma2.FAMILY, gemma3.FAMILY, deepseek.FAMILY_V2, deepseek.FAMILY_V3),
    )
}


def read_model(config: Mapping[str, Any]) -> ModelSpec:
    """The shape of the model that a Hugging Face ``config.json`` describes.

    Raises:
        SpecError: unknown family, missing key, or a feature that is not built and would be computed wrongly.
    Example:
        >>> tiny = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
        ...         "intermediate_size": 16, "vocab_size": 32, "max_position_embeddings": 64}
        >>> read_model(tiny).head_dim
        4
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise SpecError(
            f"model_type {model_type!r} is not supported",
            f"supported families: {', '.join(sorted(FAMILIES))}",
        )
    try:
        return FAMILIES[model_type].read(config)
    except KeyError as error:
        raise SpecError(f"config.json has no {error.args[0]!r}", "is this folder a Hugging Face model?") from error
