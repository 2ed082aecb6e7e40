"""A plan counts what DeepSeek's models have, and refuses what is not built for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from orchestrator.certify.shrinking import shrunken
from orchestrator.config.job import ExpertsConfig, JobConfig, TunerConfig
from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError
from orchestrator.planning.counts import TunerExtras, Workload, stage_counts
from orchestrator.planning.plan import make_plan
from orchestrator.planning.tuning import adapted_linears, beyond_peft
from parallel.capabilities import Proposal, legal_tensor_sizes, model_refusals
from parallel.families import read_model
from parallel.names import resolve_targets
from parallel.selection import frozen_weights
from parallel.specs import ClusterSpec, ModelSpec
from parallel.stages import split_layers
from parallel.topology import Topology
from tests.helpers import runs

LAPTOP = ClusterSpec("laptop", 1, 4)
LATENT = [r"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
FAMILIES = ["deepseek_v2", "deepseek_v3"]


def spec(family: str) -> ModelSpec:
    return read_model(runs.config(family))


def latent_targets(family: str) -> list[str]:
    return LATENT[:1] + LATENT[3:] if family == "deepseek_v2" else LATENT[1:]


def work_of(family: str, topology: Topology, adapted: frozenset[str], tuner: str, frozen: str = "") -> Workload:
    model = spec(family)
    extras = TunerExtras(chosen=frozen_weights([frozen] if frozen else [], model))
    stages = split_layers(model.layers, topology.pp)
    return Workload(model, Proposal(topology, tuner=tuner), stages, 128, adapted, 4, "cpu", extras)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_transformers_and_peft(family: str) -> None:
    import peft
    import torch
    import transformers

    config = {key: value for key, value in runs.config(family).items() if key != "model_type"}
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **config))
        adapted = resolve_targets(latent_targets(family), spec(family))
        counts = stage_counts(work_of(family, Topology(), adapted, "lora"), 0)
        assert counts.base == sum(parameter.numel() for parameter in real.parameters())
        tuned = peft.get_peft_model(real, peft.LoraConfig(r=4, target_modules=latent_targets(family)))
    assert counts.trainable == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


def test_the_shipped_model_has_as_many_weights_as_in_transformers() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = yaml.safe_load((Path(__file__).parents[2] / "configs/model/deepseek_v2_lite.yaml").read_text())["config"]
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    work = Workload(read_model(config), Proposal(Topology()), ((*range(27),),), 128, frozenset(), 4, "cpu")
    assert stage_counts(work, 0).base == sum(parameter.numel() for parameter in real.parameters()) == 15_706_484_224


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", ["", "kv_a_proj_with_mqa", "o_proj", ".*norm"])
def test_ranks_hold_the_whole_model_between_them(family: str, frozen: str) -> None:
    """Stages differ, tp ranks halve what is cut: the down projections, norms and routers are not."""
    whole = stage_counts(work_of(family, Topology(), frozenset(), "full", frozen), 0)
    stages = [stage_counts(work_of(family, Topology(pp=2), frozenset(), "full", frozen), stage) for stage in (0, 1)]
    assert sum(part.base for part in stages) == whole.base
    assert sum(part.trainable for part in stages) == whole.trainable
    assert stages[0].expert_trainable < stages[1].expert_trainable
    model = spec(family)
    assert model.latent is not None
    latent, moe_layers = model.latent, model.layers - model.dense_layers
    down = (latent.latent_rank + latent.rotary_dim + latent.query_rank) * model.hidden
    norms = 2 * model.hidden + latent.latent_rank + latent.query_rank
    uncut = model.layers * (down + norms) + moe_layers * model.experts * model.hidden + model.hidden
    experts = moe_layers * model.experts * 3 * model.expert_ffn * model.hidden
    half = stage_counts(work_of(family, Topology(tp=2), frozenset(), "full", frozen), 0)
    rows = 102 * model.hidden  # of 101 padded, in embedding and head
    dense = whole.base - 2 * 101 * model.hidden - uncut - experts
    assert half.base == uncut + experts + dense // 2 + rows


def test_tensor_parallel_ranks_divide_dense_layers_and_shared_experts() -> None:
    model = spec("deepseek_v3")
    assert legal_tensor_sizes(model) == [1, 2, 3, 6]
    odd = replace(model, shared_ffn=27)
    (found,) = [each for each in model_refusals(odd, Proposal(Topology(tp=2), sp=True)) if "27" in each.message]
    assert (found.message, found.hint) == (
        "model has an MLP of 27 rows, which topology.tp=2 does not divide",
        "topology.tp=3",
    )


def test_a_quantised_base_is_refused() -> None:
    for model in (spec("deepseek_v3"), dense()):
        (found,) = model_refusals(model, Proposal(Topology(), quantise="nf4"))
        assert (found.message, found.hint) == (
            "tuner.quantise=nf4 is not built for latent attention",
            "tuner.quantise=null",
        )


def dense() -> ModelSpec:
    return read_model(runs.config("deepseek_v3", first_k_dense_replace=4))


@pytest.mark.parametrize(
    ("model", "tuner", "message"),
    [
        (spec("deepseek_v2"), "full", "moves biases of the choice of experts, which a deepseek_v2 model has none of"),
        (spec("deepseek_v3"), "lora", "needs tuner=full: an adapter's checkpoint holds no biases of routers"),
    ],
)
def test_biases_move_in_full_tuning_of_models_that_have_them(model: ModelSpec, tuner: str, message: str) -> None:
    job = JobConfig(tuner=TunerConfig(name=tuner, targets=["o_proj"]), experts=ExpertsConfig(bias_rate=0.001))
    job = replace(job, batch=replace(job.batch, sequence_tokens=128))
    with pytest.raises(ConfigError) as caught:
        make_plan(job, model, LAPTOP)
    assert str(caught.value).startswith("experts.bias_rate=0.001 ") and message in str(caught.value)
    assert caught.value.hint == "experts.bias_rate=0"
    assert make_plan(replace(job, tuner=TunerConfig(name="full")), spec("deepseek_v3"), LAPTOP)


def test_what_peft_takes_for_experts_has_no_magnitudes_there() -> None:
    """A dense layer's linears have experts' names."""
    for targets, words in ((r".*layers\.0\.mlp\..*", "DoRA on experts and routers"), (LATENT[1:], "")):
        tuner = TunerConfig(targets=targets, dora=True)
        adapted = adapted_linears(JobConfig(tuner=tuner), spec("deepseek_v3"))
        assert beyond_peft(tuner, adapted, spec("deepseek_v3")) == words


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_small_model_keeps_what_makes_it_a_deepseek(ranks: int) -> None:
    lite = compose_job(["model=deepseek_v2_lite"]).model.config or {}
    big = {**lite, "model_type": "deepseek_v3", "q_lora_rank": 1536, "n_routed_experts": 256, "n_group": 8}
    big |= {"topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_experts_per_tok": 8}
    for config in (lite, big):
        large, small = read_model(config), read_model(shrunken(config, ranks))
        assert large.latent is not None and small.latent is not None
        assert large.routing is not None and small.routing is not None
        assert (small.dense_layers, small.hidden < 300) == (1, True)
        assert bool(small.latent.query_rank) == bool(large.latent.query_rank)
        assert (small.routing.groups > 1) == (large.routing.groups > 1)
        assert [small.heads % size for size in range(2, ranks + 1)].count(0) > 0
