"""Family promises: a config.json is read as its family means it, and what we would compute wrongly is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.families import FAMILIES, read_model
from parallel.rotary import frequencies
from parallel.specs import SpecError

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
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 8}
MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


V2 = {"model_type": "deepseek_v2", "num_key_value_heads": 6, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
V3 = {**V2, "model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 4, "topk_group": 2}


def test_a_llama_config_is_read_with_transformers_defaults() -> None:
    spec = read_model({**LLAMA, "rope_theta": 100000, "tie_word_embeddings": True})
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (2, 24, 6, 3, 4)
    assert (spec.rope_theta, spec.tied_embeddings, spec.is_moe, spec.qkv_bias, spec.qk_norm) == (
        1e5,
        True,
        False,
        False,
        False,
    )
    assert read_model({**LLAMA, "num_key_value_heads": None}).kv_heads == 6


def test_the_rope_base_is_found_in_either_place() -> None:
    """Transformers 5 writes rope_parameters, earlier versions rope_theta."""
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert read_model({**LLAMA, **nested}).rope_theta == read_model({**LLAMA, "rope_theta": 5e5}).rope_theta


def test_families_differ_in_biases_norms_and_experts() -> None:
    assert read_model({**LLAMA, "model_type": "qwen2"}).qkv_bias
    qwen3 = read_model({**LLAMA, "model_type": "qwen3", "head_dim": 16})
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 16
    moe = read_model(MOE)
    assert moe.is_moe and (moe.experts, moe.experts_per_token, moe.expert_ffn) == (4, 2, 16)
    assert not moe.normalise_expert_weights and read_model({**MOE, "norm_topk_prob": True}).normalise_expert_weights


def test_a_balancing_loss_is_there_where_transformers_adds_one() -> None:
    asked = {**MOE, "router_aux_loss_coef": 0.01}
    assert read_model(asked).router_aux_loss == 0
    assert read_model({**asked, "output_router_logits": True}).router_aux_loss == 0.01


def test_experts_are_counted_in_either_place() -> None:
    """Transformers 5 writes num_local_experts, earlier versions num_experts."""
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in MOE.items()}
    assert "num_experts" not in renamed and read_model(renamed) == read_model(MOE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "ntk"}}, "rope scaling 'ntk' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "config.json has no 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported: heads are turned whole"),
        ({"attention_dropout": 0.1}, "a llama model with attention_dropout=0.1 is not supported yet"),
        ({"quantization_config": {"quant_method": "fp8"}}, "a llama model with quantization_config="),
        ({**MOE, "model_type": "mixtral", "router_jitter_noise": 0.1}, "a mixtral model with router_jitter_noise=0.1"),
        (
            {**GEMMA3, "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
            "a gemma3_text model with yarn is not supported yet",
        ),
        ({"attention_bias": True}, "a llama model with attention_bias=True is not supported yet"),
        ({"mlp_bias": True}, "a llama model with mlp_bias=True is not supported yet"),
        ({"model_type": "qwen3", "attention_bias": True}, "a qwen3 model with attention_bias=True"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "a gemma3_text model with use_bidirectional_attention=True"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "a gemma3_text model with attn_logit_softcapping=50.0"),
        ({**GEMMA3, "hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        ({**GEMMA3, "layer_types": ["full_attention"]}, "layer_types names 1 layers, but num_hidden_layers=2"),
        ({**GEMMA3, "layer_types": 2 * ["chunked_attention"]}, "2 layers of kind chunked_attention, but"),
        (
            {**GEMMA3, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope scaling 'linear' in layers with a window is not supported yet",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({**MOE, "mlp_only_layers": [0]}, "a mixture of experts with dense layers in between"),
        ({**MOE, "decoder_sparse_step": 2}, "a mixture of experts with dense layers in between"),
        ({**V2, "norm_topk_prob": True}, "a deepseek_v2 model with norm_topk_prob=True is not supported yet"),
        ({**V2, "topk_method": "noaux_tc"}, "topk_method=noaux_tc of a deepseek_v2 model is not supported"),
        ({**V2, "scoring_func": "sigmoid"}, "scoring_func=sigmoid of a deepseek_v2 model is not supported"),
        ({**V2, "moe_layer_freq": 2}, "moe_layer_freq=2 is not supported: dense layers come first"),
        ({**V2, "n_shared_experts": 0}, "a deepseek_v2 model without shared experts is not supported"),
        ({**V2, "num_experts_per_tok": None}, "config.json has no 'num_experts_per_tok'"),
        ({**V2, "attention_bias": True}, "a deepseek_v2 model with attention_bias=True"),
        ({**V2, "num_key_value_heads": 3}, "latent attention has keys for each head, but num_key_value_heads=3"),
        ({**V3, "n_group": 3}, "n_routed_experts=8 cannot be routed in n_group=3 equal groups of which topk_group=2"),
        ({**V3, "n_group": 8}, "n_routed_experts=8 cannot be routed in n_group=8 equal groups"),
        ({**V3, "num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts of the chosen groups"),
        ({**V3, "quantization_config": {"quant_method": "fp8"}}, "a deepseek_v3 model with quantization_config="),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_model({**LLAMA, **changes})


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"model_type", "num_key_value_heads"}))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(SpecError, match=f"config.json has no '{key}'") as caught:
        read_model({name: value for name, value in LLAMA.items() if name != key})
    assert caught.value.hint == "is this folder a Hugging Face model?"


def test_supported_families_are_listed() -> None:
    with pytest.raises(SpecError) as caught:
        read_model({})
    known = "deepseek_v2, deepseek_v3, gemma2, gemma3_text, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe"
    assert caught.value.hint == f"supported families: {known}"


def test_a_family_is_its_model_type() -> None:
    assert all(name == family.name for name, family in FAMILIES.items())


STRETCHED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn-of-deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "yarn-over-all": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-as-told": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", STRETCHED)
@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_frequencies_are_those_of_transformers(name: str, width: int, key: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": name, "rope_theta": 5e5, **STRETCHED[name]}
    config = {**LLAMA, "head_dim": width, "max_position_embeddings": 131072, "rope_theta": 5e5, key: scaling}
    theirs = LlamaConfig(**{**config, "rope_scaling": None, "rope_parameters": scaling})
    expected, temperature = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, None)
    spec = read_model(config)
    assert spec.rope_scaling is not None
    torch.testing.assert_close(frequencies(spec.rope_theta, width, spec.rope_scaling), expected, rtol=1e-6, atol=0)
    assert spec.rope_scaling.score_factor == pytest.approx(temperature**2)


def test_original_positions_beside_the_rotary_embedding_count() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    found = read_model({**LLAMA, "rope_scaling": scaling, "original_max_position_embeddings": 64}).rope_scaling
    assert found is not None and found.original_positions == 64


DEEPSEEK_NEEDS = {"deepseek_v2": {"num_experts_per_tok": 6}, "deepseek_v3": {"num_key_value_heads": 6}}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    from transformers import AutoConfig

    least = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = {**least, **(experts if family in ("mixtral", "qwen3_moe") else {}), "model_type": family}
    config |= DEEPSEEK_NEEDS.get(family, {})
    theirs = AutoConfig.for_model(**config, output_router_logits=True)
    ours = read_model({**config, "output_router_logits": True})
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4)
    assert (ours.norm_epsilon, ours.rope_theta) == (theirs.rms_norm_eps, rope["rope_theta"])
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.router_aux_loss == getattr(theirs, "router_aux_loss_coef", 0)


def test_windows_lie_where_transformers_puts_them() -> None:
    from transformers import AutoConfig

    layers = {"num_hidden_layers": 12, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 5}
    for family in ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"):
        config = {**LLAMA, **layers, "model_type": family, "head_dim": 8}
        theirs = AutoConfig.for_model(**config)
        kinds = getattr(theirs, "layer_types", None) or 12 * ["sliding_attention"]
        assert read_model(config).windows == tuple(7 if kind == "sliding_attention" else 0 for kind in kinds), family
        assert read_model({**config, "sliding_window": None, "layer_types": None}).windows == ()
    assert read_model({**MOE, **layers}).windows == 12 * (7,)
    assert read_model({**MOE, **layers, "use_sliding_window": False}).windows == ()


def test_gemma_says_what_its_config_leaves_out() -> None:
    two = read_model({**LLAMA, "model_type": "gemma2", "head_dim": 8})
    assert (two.score_cap, two.logit_cap, two.tied_embeddings, two.score_scale) == (50.0, 30.0, True, 1 / 16)
    assert two.embedding_scale**2 == pytest.approx(24) and two.norm_offset and two.sandwich_norms
    assert read_model({**LLAMA, "model_type": "gemma2", "head_dim": 8, "attn_logit_softcapping": None}).score_cap == 0
    three = read_model(GEMMA3 | LLAMA | {"model_type": "gemma3_text"})
    assert (three.rope_theta, three.local_rope_theta, three.logit_cap, three.qk_norm) == (1e6, 1e4, 0, True)
    nested = {"full_attention": {"rope_theta": 2e6}, "sliding_attention": {"rope_theta": 3e4}}
    five = read_model({**LLAMA, **GEMMA3, "rope_parameters": nested})
    assert (five.rope_theta, five.local_rope_theta) == (2e6, 3e4)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_what_deepseek_leaves_out_is_what_transformers_takes(family: str) -> None:
    from transformers import AutoConfig

    config = {**LLAMA, "num_hidden_layers": 5, "model_type": family, "num_key_value_heads": 6}
    config |= {"num_experts_per_tok": 6} if family == "deepseek_v2" else {}
    ours, theirs = read_model(config), AutoConfig.for_model(**config)
    latent, routing = ours.latent, ours.routing
    assert latent is not None and routing is not None
    assert (latent.query_rank, latent.latent_rank) == (theirs.q_lora_rank, theirs.kv_lora_rank)
    assert (latent.plain_dim, latent.rotary_dim) == (theirs.qk_nope_head_dim, theirs.qk_rope_head_dim)
    assert (latent.value_dim, latent.key_dim) == (theirs.v_head_dim, theirs.qk_head_dim)
    assert latent.interleaved == getattr(theirs, "rope_interleave", True)
    assert (ours.experts, ours.experts_per_token) == (theirs.n_routed_experts, theirs.num_experts_per_tok)
    assert (ours.expert_ffn, ours.dense_layers) == (theirs.moe_intermediate_size, theirs.first_k_dense_replace)
    assert ours.shared_ffn == theirs.moe_intermediate_size * theirs.n_shared_experts
    assert (routing.scale, ours.normalise_expert_weights) == (theirs.routed_scaling_factor, theirs.norm_topk_prob)
    if routing.bias:
        assert (routing.groups, routing.chosen_groups) == (theirs.n_group, theirs.topk_group)
    assert [ours.has_experts(layer) for layer in range(5)] == [
        layer >= theirs.first_k_dense_replace for layer in range(5)
    ]


def test_null_is_what_deepseek_leaves_out_but_for_latent_queries() -> None:
    spec = read_model({**LLAMA, **V3, "num_key_value_heads": None, "q_lora_rank": None, "moe_layer_freq": None})
    assert spec.latent is not None and spec.routing is not None
    assert (spec.kv_heads, spec.latent.query_rank) == (6, 0)


def test_deepseek_without_experts_is_dense() -> None:
    dense = read_model({**LLAMA, **V3, "first_k_dense_replace": 2})
    assert not dense.is_moe and dense.routing is None and dense.dense_mlps == (48,)
    assert read_model({**LLAMA, **V3, "moe_intermediate_size": 16}).dense_mlps == (48, 16)
