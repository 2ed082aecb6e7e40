"""Weights are chosen by patterns of their Hugging Face names; a choice that cannot be kept is refused with names."""

from __future__ import annotations

import pytest

from orchestrator.checkpoint.experts import common_name
from parallel.families import read_model
from parallel.selection import SelectionError, frozen_weights, rate_ratios, saved_weights, weight_shapes
from parallel.specs import ModelSpec
from tests.helpers import runs


def spec(family: str) -> ModelSpec:
    return read_model(runs.config(family))


@pytest.mark.parametrize("family", runs.FAMILIES)
def test_weights_are_those_of_transformers(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in runs.config(family).items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    ours = weight_shapes(spec(family))
    if spec(family).is_moe:  # transformers 5 joins the experts of a layer in one tensor; its files do not
        theirs = {name: shape for name, shape in theirs.items() if ".experts." not in name}
        ours = {common_name(name): shape for name, shape in ours.items() if ".experts." not in name}
    assert ours == theirs


def test_a_pattern_is_a_name_or_an_expression() -> None:
    model = spec("llama")
    assert frozen_weights(["embed_tokens"], model) == {"model.embed_tokens.weight"}
    assert frozen_weights(["mlp.down_proj"], model) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)}
    assert len(frozen_weights([r"model\.layers\.[01]\..*"], model)) == 2 * 9
    assert frozen_weights([r"model\.norm\.weight"], model) == {"model.norm.weight"}
    assert frozen_weights([], model) == frozenset()


def test_the_last_of_several_rates_counts() -> None:
    found = rate_ratios({r"model\..*": 0.5, "embed_tokens": 0.25}, spec("llama"))
    assert found["model.norm.weight"] == 0.5 and found["model.embed_tokens.weight"] == 0.25


@pytest.mark.parametrize(
    ("patterns", "message", "hint"),
    [
        (["embed_token"], "tuner.freeze: 'embed_token' matches no weight of this llama model", "near names: embed_tok"),
        (["lm_head"], "tuner.freeze: 'lm_head' matches no weight", "near names: "),  # it is tied
        (["("], "tuner.freeze: '(' is no regular expression", "embed_tokens"),
        ([".*"], "leaves nothing to train", "tuner.freeze=[embed_tokens]"),
        (
            ["q_proj"],
            "q_proj, k_proj, v_proj of layer 0 are one tensor here, and only q_proj is chosen alone",
            "choose q_proj, k_proj, v_proj together, or none of them",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(patterns: list[str], message: str, hint: str) -> None:
    with pytest.raises(SelectionError) as caught:
        frozen_weights(patterns, spec("llama"))
    assert message in str(caught.value) and caught.value.hint.startswith(hint)


def test_two_rates_for_one_tensor_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"optimizer\.lr_ratios: gate_proj, up_proj of layer 0 are one"):
        rate_ratios({"gate_proj": 0.5, "up_proj": 0.25}, spec("llama"))


def test_modules_to_save_are_matched_as_peft_matches_them() -> None:
    assert saved_weights(["embed_tokens", "lm_head"], spec("qwen2")) == {"model.embed_tokens.weight", "lm_head.weight"}
    norms = saved_weights(["norm"], spec("qwen2"))
    assert len(norms) == 2 * 4 + 1 and "model.layers.0.input_layernorm.weight" in norms


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["lm_head"], "'lm_head' matches no weight of its own of this llama model: its head is its embedding"),
        (["score"], "'score' matches no weight of its own of this llama model"),
        (
            ["norm", "q_proj"],
            "chooses 4 linears, first model.layers.0.self_attn.q_proj.weight: they learn by an adapter",
        ),
    ],
)
def test_modules_that_cannot_be_saved_are_refused(modules: list[str], message: str) -> None:
    with pytest.raises(SelectionError, match=message) as caught:
        saved_weights(modules, spec("llama"))
    assert caught.value.hint == "tuner.modules_to_save=[embed_tokens]"
