"""What a model and a cluster are, as plain values: no weights, no torch, no process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe"}


class SpecError(ValueError):
    """A config.json that describes no model we know; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder, named as in a Hugging Face ``config.json``.

    Sizes are whole-model sizes (not per rank). ``ffn`` is the width of one dense MLP (gate and up have this many rows
    each); ``expert_ffn`` that of one expert. ``experts == 0`` means a dense model. ``router_aux_loss`` is the
    coefficient of the balancing loss that a run has unless it says otherwise.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    normalise_expert_weights: bool = True
    router_aux_loss: float = 0.0

    @property
    def is_moe(self) -> bool:
        """Whether the MLPs are mixtures of experts."""
        return self.experts > 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a Hugging Face ``config.json`` mapping.

        Raises:
            SpecError: unknown family, missing key, or a feature (rope scaling, sliding window, ...) not built here.
        Example:
            >>> tiny = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
            ...         "intermediate_size": 16, "vocab_size": 32, "max_position_embeddings": 64}
            >>> ModelSpec.from_hf(tiny).head_dim
            4
        """
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise SpecError(
                f"model_type {model_type!r} is not supported",
                f"supported families: {', '.join(sorted(FAMILIES))}",
            )
        _refuse_unbuilt(config)
        try:
            return _build(FAMILIES[model_type], config)
        except KeyError as error:
            raise SpecError(f"config.json has no {error.args[0]!r}", "is this folder a Hugging Face model?") from error


def _build(family: str, config: Mapping[str, Any]) -> ModelSpec:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    rope = config.get("rope_parameters") or {}
    moe = family == "qwen3_moe"
    return ModelSpec(
        family=family,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        ffn=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family == "qwen3" and bool(config.get("attention_bias", False))),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        experts=_experts(config) if moe else 0,
        experts_per_token=int(config["num_experts_per_tok"]) if moe else 0,
        expert_ffn=int(config["moe_intermediate_size"]) if moe else 0,
        normalise_expert_weights=bool(config.get("norm_topk_prob", False)) if moe else True,
        router_aux_loss=_balancing(config) if moe else 0.0,
    )


def _experts(config: Mapping[str, Any]) -> int:
    """transformers 5 writes ``num_local_experts`` where older versions, and the hub's files, say ``num_experts``."""
    return int(config["num_local_experts"] if "num_local_experts" in config else config["num_experts"])


def _balancing(config: Mapping[str, Any]) -> float:
    """transformers adds a balancing loss only where the config also asks for the router's logits."""
    return float(config.get("router_aux_loss_coef", 0.0)) if config.get("output_router_logits") else 0.0


def _refuse_unbuilt(config: Mapping[str, Any]) -> None:
    """Refuse what would be computed wrongly without a word."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise SpecError(f"rope scaling {kind!r} is not supported yet", "use a model with plain rotary embeddings")
    if config.get("use_sliding_window"):
        raise SpecError("sliding-window attention is not supported yet", "set use_sliding_window to false")
    if config.get("model_type") == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        raise SpecError("a Llama with attention_bias or mlp_bias is not supported yet")
    if config.get("hidden_act", "silu") != "silu":
        raise SpecError(f"hidden_act {config['hidden_act']!r} is not supported (silu is)")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise SpecError("a mixture of experts with dense layers in between is not supported yet")


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a Hugging Face folder.

    Raises:
        SpecError: there is no such file, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"{folder} is no model folder: it has no config.json", "model.path=FOLDER") from error
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise SpecError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{path} holds no JSON object")
    return value


@dataclass(frozen=True)
class ClusterSpec:
    """The machines of a run. ``gpus_per_node`` counts ranks per node (processes, on a CPU).

    ``memory_gib`` is what one rank may use: a GPU's memory, or a rank's fair part of the host's.
    """

    name: str
    nodes: int
    gpus_per_node: int
    device: str = "cpu"
    memory_gib: float = 4.0

    @property
    def ranks(self) -> int:
        """How many ranks there are at most."""
        return self.nodes * self.gpus_per_node
