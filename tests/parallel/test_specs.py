"""Spec promises: a config.json is read as its family means it, and what we would compute wrongly is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.specs import ClusterSpec, ModelSpec, SpecError, read_hf_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def test_a_llama_config_is_read_with_transformers_defaults() -> None:
    spec = ModelSpec.from_hf({**LLAMA, "rope_theta": 100000, "tie_word_embeddings": True})
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (2, 24, 6, 3, 4)
    assert (spec.rope_theta, spec.tied_embeddings, spec.is_moe, spec.qkv_bias, spec.qk_norm) == (
        1e5,
        True,
        False,
        False,
        False,
    )
    assert ModelSpec.from_hf({**LLAMA, "num_key_value_heads": None}).kv_heads == 6


def test_the_rope_base_is_found_in_either_place() -> None:
    """Transformers 5 writes rope_parameters, earlier versions rope_theta."""
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert (
        ModelSpec.from_hf({**LLAMA, **nested}).rope_theta == ModelSpec.from_hf({**LLAMA, "rope_theta": 5e5}).rope_theta
    )


def test_families_differ_in_biases_norms_and_experts() -> None:
    assert ModelSpec.from_hf({**LLAMA, "model_type": "qwen2"}).qkv_bias
    qwen3 = ModelSpec.from_hf({**LLAMA, "model_type": "qwen3", "head_dim": 16})
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 16
    moe = ModelSpec.from_hf(MOE)
    assert moe.is_moe and (moe.experts, moe.experts_per_token, moe.expert_ffn) == (4, 2, 16)
    assert (
        not moe.normalise_expert_weights and ModelSpec.from_hf({**MOE, "norm_topk_prob": True}).normalise_expert_weights
    )


def test_a_balancing_loss_is_there_where_transformers_adds_one() -> None:
    asked = {**MOE, "router_aux_loss_coef": 0.01}
    assert ModelSpec.from_hf(asked).router_aux_loss == 0
    assert ModelSpec.from_hf({**asked, "output_router_logits": True}).router_aux_loss == 0.01


def test_experts_are_counted_in_either_place() -> None:
    """Transformers 5 writes num_local_experts, earlier versions num_experts."""
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in MOE.items()}
    assert "num_experts" not in renamed and ModelSpec.from_hf(renamed) == ModelSpec.from_hf(MOE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3' is not supported yet"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' is not supported yet"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported yet"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported yet"),
        ({"attention_bias": True}, "a Llama with attention_bias or mlp_bias is not supported yet"),
        ({"mlp_bias": True}, "a Llama with attention_bias or mlp_bias is not supported yet"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({**MOE, "mlp_only_layers": [0]}, "a mixture of experts with dense layers in between"),
        ({**MOE, "decoder_sparse_step": 2}, "a mixture of experts with dense layers in between"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_hf({**LLAMA, **changes})


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"model_type", "num_key_value_heads"}))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(SpecError, match=f"config.json has no '{key}'") as caught:
        ModelSpec.from_hf({name: value for name, value in LLAMA.items() if name != key})
    assert caught.value.hint == "is this folder a Hugging Face model?"


def test_supported_families_are_listed() -> None:
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_hf({})
    assert caught.value.hint == "supported families: llama, qwen2, qwen3, qwen3_moe"


def test_a_config_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert read_hf_config(tmp_path) == LLAMA


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no model folder: it has no config.json"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "holds no JSON object"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SpecError, match=message):
        read_hf_config(tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="cannot be read as JSON"):
        read_hf_config(tmp_path / "file")


def test_a_cluster_counts_its_ranks() -> None:
    assert ClusterSpec("pair", nodes=2, gpus_per_node=8).ranks == 16
