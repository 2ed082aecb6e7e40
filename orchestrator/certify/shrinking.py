"""A model of the same architecture that trains in seconds: the ratios that topologies depend on are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from parallel.capabilities import quantised_tensor_sizes
from parallel.families import read_model
from parallel.specs import ModelSpec

HEAD_DIMS, BLOCK = (8, 16, 32, 64, 128), 64  # of NF4: elements with one scale
VOCABULARY, POSITIONS, FEWEST_LAYERS = 101, 256, 5
WINDOW = 7  # tokens that a query sees where layers have a window: fewer than a row has
SMALL_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
EXPERT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")  # beyond the small vocabulary


def shrunken(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """A small ``config.json`` whose heads, groups, experts and MLP are cut by exactly the same sizes up to ``ranks``.

    Queries per key/value group, tied embeddings, norms, biases and rotary embeddings stay as they are. There is a layer
    more than ranks (fewer where the model has fewer), so that stages are uneven too. Windows are shorter than a row,
    and where the model has layers with and without one, so has the small one.

    Args:
        config: the model's ``config.json``.
        ranks: the largest size of an axis that shall be tried.
    Raises:
        SpecError: the config describes no model that we know.
    Example:
        >>> from orchestrator.config.loading import compose_job
        >>> small = shrunken(compose_job(["model=llama3_8b"]).model.config, ranks=4)
        >>> [small[key] for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size")]
        [32, 8, 5, 256]
    """
    model = read_model(config)
    kv_heads = _several(model.kv_heads, ranks)
    heads = kv_heads * (model.heads // model.kv_heads)
    small = {key: value for key, value in config.items() if key not in (*TOKEN_KEYS, "layer_types")}
    layers = min(model.layers, max(ranks + 1, FEWEST_LAYERS))
    small |= {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": _small_ffn(model.ffn, ranks),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        **_small_windows(model, layers),
    }
    if model.is_moe:
        experts = _fewest_experts(model.experts, ranks)
        small |= {
            next((key for key in EXPERT_KEYS if key in config), EXPERT_KEYS[-1]): experts,
            "num_experts_per_tok": min(model.experts_per_token, max(1, experts // 2)),
        }
        if model.dense_layers:
            small["first_k_dense_replace"] = 1
        if model.routing is not None and model.routing.groups > 1:
            small |= {"n_group": 2, "topk_group": 1}
        if "moe_intermediate_size" in config:
            small["moe_intermediate_size"] = _small_ffn(model.expert_ffn, ranks)
    if model.latent is not None:
        small |= SMALL_LATENT | {"q_lora_rank": SMALL_LATENT["kv_lora_rank"] if model.latent.query_rank else None}
    wide = model.hidden == model.heads * model.head_dim
    sizes = [{"head_dim": head, "hidden_size": heads * head if wide else math.lcm(BLOCK, heads)} for head in HEAD_DIMS]
    legal = _quantised_cuts(model, ranks)
    fitting = (one for one in sizes if _quantised_cuts(read_model(small | one), ranks) == legal)
    return small | next(fitting, sizes[0])


def _quantised_cuts(model: ModelSpec, ranks: int) -> list[int]:
    return [size for size in quantised_tensor_sizes(model) if size <= ranks]


def _small_windows(model: ModelSpec, layers: int) -> dict[str, Any]:
    """Keys for shorter windows in the first layers; a kind of layer that only later ones are takes the last place."""
    if not model.windows:
        return {}
    kinds = ["sliding_attention" if window else "full_attention" for window in model.windows]
    if len(set(kinds)) == 1:
        return {"sliding_window": WINDOW, "layer_types": kinds[:layers]}
    chosen = kinds[:layers]
    if len(set(chosen)) == 1:
        chosen[-1] = next(kind for kind in kinds if kind != chosen[0])
    return {"sliding_window": WINDOW, "layer_types": chosen}


def _small_ffn(ffn: int, ranks: int) -> int:
    """Rows of a small MLP: whole blocks of 64 where ``ffn`` is, so that a quantised one is cut by the same sizes."""
    if ffn % BLOCK == 0:
        return BLOCK * _same_cuts(ffn // BLOCK, ranks)
    return _same_cuts(ffn, ranks) * _coprime(ranks)


def _several(size: int, ranks: int) -> int:
    """A small size that is divided by the same numbers up to ``ranks``, with several on a rank where ``size`` has.

    Example:
        >>> [_several(size, 4) for size in (8, 9, 28, 4, 128)]
        [8, 9, 8, 4, 8]
    """
    every = math.lcm(*range(1, ranks + 1))
    least = math.gcd(size, every)
    if size == least:
        return size
    return next(least * factor for factor in range(2, size // least + 1) if math.gcd(least * factor, every) == least)


def _fewest_experts(size: int, ranks: int) -> int:
    """As many experts as are cut by the same numbers up to ``ranks``, with several on a rank on half of these ranks.

    Each costs its own products and adapters in every layer, so there are no more than that.

    Example:
        >>> [_fewest_experts(128, ranks) for ranks in (2, 3, 4, 8)], _fewest_experts(60, 4), _fewest_experts(3, 4)
        ([4, 4, 4, 8], 12, 3)
    """
    every = math.lcm(*range(1, ranks + 1))
    least = math.gcd(size, every)
    wanted = max(4, ranks)
    fitting = (least * factor for factor in range(1, size // least + 1) if math.gcd(least * factor, every) == least)
    return next((count for count in fitting if count >= wanted), size)


def _same_cuts(size: int, ranks: int) -> int:
    """The smallest size that is divided by the same numbers up to ``ranks``.

    Example:
        >>> [_same_cuts(size, 4) for size in (8, 9, 28, 7)]
        [4, 3, 4, 1]
    """
    return math.gcd(size, math.lcm(*range(1, ranks + 1)))


def _coprime(ranks: int) -> int:
    """A factor of at least 7 that lets no further number up to ``ranks`` divide."""
    cuts = range(2, ranks + 1)
    return next(number for number in range(7, 8 + 2 * ranks) if all(math.gcd(number, cut) == 1 for cut in cuts))
