"""Tuners as users ask for them: each composes, plans, and is refused where it cannot mean anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from orchestrator.assemble import engine_spec
from orchestrator.checkpoint.adapter import adapter_config
from orchestrator.commands import plan_job
from orchestrator.config.building import job_from_yaml, job_to_yaml
from orchestrator.config.job import JobConfig, TunerConfig
from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError
from orchestrator.planning.counts import TunerExtras, moment_numbers, stage_counts
from orchestrator.planning.estimate import estimate_memory, estimate_time, setup_of
from orchestrator.planning.projected import projection
from orchestrator.planning.show import render
from orchestrator.planning.timing import choosing_s
from orchestrator.planning.tuning import adapted_linears
from parallel.galore_spec import GaloreSpec
from parallel.names import leaf_names
from parallel.topology import Topology
from tests.orchestrator.test_plan_estimates import LAPTOP, MOE, QWEN3, SMOLLM2, work_of

SMOLLM2_JOB = ["model=smollm2_135m", "cluster=one"]
MOE_JOB = ["model=qwen3_30b_a3b", "cluster=h100x8", "tuner.targets=[q_proj,v_proj]"]


def planned(*overrides: str) -> Any:
    return plan_job(compose_job([*SMOLLM2_JOB, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "adapter"),
    [
        (["tuner=dora"], {"dora": True, "init": "default", "lr_ratio": 1.0}),
        (["tuner=pissa"], {"dora": False, "init": "pissa"}),
        (["tuner=dora", "tuner.init=pissa", "tuner.rslora=true"], {"dora": True, "init": "pissa", "rslora": True}),
        (["tuner.loraplus_lr_ratio=16"], {"lr_ratio": 16.0}),
        (["tuner=qlora", "topology.tp=3", "cluster=laptop"], {"dora": False}),
    ],
)
def test_what_is_asked_reaches_the_engine(overrides: list[str], adapter: dict[str, Any]) -> None:
    found = planned(*overrides)
    spec = engine_spec(found.job, found.plan, found.model)
    assert {name: getattr(spec.lora, name) for name in adapter} == adapter
    assert spec.quantise == ("nf4" if "tuner=qlora" in overrides else None)
    assert job_from_yaml(job_to_yaml(found.job)) == found.job


def test_frozen_weights_and_rates_reach_the_engine() -> None:
    found = planned("tuner=full", "tuner.freeze=[embed_tokens]", "optimizer.lr_ratios={mlp.down_proj:0.5,norm:2}")
    spec = engine_spec(found.job, found.plan, found.model)
    assert spec.lora is None and spec.frozen == {"model.embed_tokens.weight"}
    assert spec.lr_ratios["model.layers.29.mlp.down_proj.weight"] == 0.5 and spec.lr_ratios["model.norm.weight"] == 2.0
    assert len(spec.lr_ratios) == 31


def test_galore_reaches_the_engine_and_its_moments_are_never_dealt_out() -> None:
    words = ["tuner=full", "optimizer=galore", "optimizer.galore.rank=32", "optimizer.galore.projection=left"]
    found = planned(*words, "cluster=laptop", "topology.dp=2", "cluster.memory_gib=8")
    spec = engine_spec(found.job, found.plan, found.model)
    assert spec.galore == GaloreSpec(rank=32, projection="left") and not spec.adam.distributed
    assert planned("tuner=full").job.optimizer.name == "adamw" and job_from_yaml(job_to_yaml(found.job)) == found.job
    console = Console(width=120)
    with console.capture() as caught:
        console.print(render(found.plan, found.job, found.model))
    assert "full, galore r=32" in caught.get()


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["optimizer=galore"], "galore projects gradients of whole matrices, but tuner.name=lora", "optimizer=adamw"),
        (
            ["tuner=full", "optimizer=galore", "optimizer.distributed=true", "cluster=laptop", "topology.dp=2"],
            "optimizer.distributed=true deals moments out by ranges of elements, but optimizer=galore projects whole",
            "optimizer.distributed=false",
        ),
        (
            ["tuner=full", "optimizer=galore", "optimizer.galore.projection=full"],
            "is none of std, rev",
            "optimizer.galore.projection=",
        ),
        (["tuner=full", "optimizer.name=sgd"], "optimizer.name=sgd is none of adamw, galore", "optimizer.name=adamw"),
        (["tuner=full", "optimizer.galore.scale=0"], "should be above 0", "optimizer.galore.scale=0.25"),
        (["tuner=full", "tuner.dora=true"], "tuner.dora=true is for adapters", "tuner=lora tuner.dora=true"),
        (["tuner=full", "tuner.init=pissa"], "tuner.init=pissa is for adapters", "tuner=lora tuner.init=pissa"),
        (["tuner=full", "tuner.loraplus_lr_ratio=4"], "tuner.loraplus_lr_ratio=4 is for ad", "tuner=lora tuner.lorapl"),
        (["tuner=full", "tuner.quantise=nf4"], "freezes the base, but tuner=full trains it", "tuner=qlora"),
        (["tuner=full", "optimizer.lr_ratios={norm:0}"], "lr_ratios has norm: 0, which", "tuner.freeze=[norm]"),
        (["tuner=full", "tuner.freeze=[head]"], "'head' matches no weight", "near names"),
        (["tuner.freeze=[norm]"], "is for full tuning", "tuner.freeze=[]"),
        (["optimizer.lr_ratios={norm:2}"], "is for full tuning", "optimizer.lr_ratios={} tuner.loraplus_lr_ratio=16"),
        (["tuner.init=pissa", "tuner.dropout=0.1"], "largest components at random", "tuner.dropout=0"),
        (["tuner.init=pissa", "tuner.path=a"], "are two starts", "tuner.init=default"),
        (["tuner.init=pissa", "tuner.quantise=nf4"], "is not built", "tuner.init=default"),
        (
            ["tuner.init=pissa", "tuner.r=200"],
            "but model.layers.0.self_attn.k_proj has 192",
            "tuner.r=192",
        ),
        (["tuner=full", "tuner.modules_to_save=[norm]"], "is for adapters", "tuner=lora tuner.modules_to_save=[norm]"),
        (["tuner.modules_to_save=[lm_head]"], "its head is its embedding", "tuner.modules_to_save=[embed_tokens]"),
        (["tuner.init=pisa"], "tuner.init=pisa is none of default, pissa", "tuner.init=pissa"),
        (["tuner.loraplus_lr_ratio=0"], "should be above 0", "tuner.loraplus_lr_ratio=16"),
        ([*MOE_JOB, "tuner.quantise=nf4", "model.config.moe_intermediate_size=96"], "whole blocks of 64", "tuner.quan"),
    ],
)
def test_what_means_nothing_is_refused(overrides: list[str], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(*overrides)
    assert message in str(caught.value) and caught.value.hint.startswith(hint)


def test_targets_beside_full_tuning_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tuner\.targets=\[q_proj\] is for adapters") as caught:
        compose_job(["tuner=full", "tuner.targets=[q_proj]"])
    assert caught.value.hint == "tuner=lora tuner.targets=[q_proj]"


def test_a_plan_says_what_peft_has_no_place_for() -> None:
    fixed = ("topology.tp=1", "topology.pp=1", "topology.cp=1", "topology.ep=8", "topology.etp=1")
    experts = [*SMOLLM2_JOB, *MOE_JOB, "tuner.targets=[q_proj,gate,down_proj]", *fixed]
    reasons = plan_job(compose_job([*experts, "tuner.dora=true"])).plan.reasons
    words = "DoRA on experts and routers: PEFT has no place for it, so isotrain export makes it --to merged only"
    assert words in reasons
    held = ["tuner.init=pissa", "tuner.dora=true tuner.targets=[q_proj]", "tuner.quantise=nf4"]
    for setting in held:
        assert words not in plan_job(compose_job([*experts, *setting.split()])).plan.reasons
    words = words.replace("DoRA", "DoRA and dropout")
    assert words in plan_job(compose_job([*experts, "tuner.dora=true", "tuner.dropout=0.1"])).plan.reasons


def test_what_peft_does_not_define_for_an_embedding_is_refused() -> None:
    untied = replace(SMOLLM2, tied_embeddings=False)
    asked = TunerConfig(targets=["q_proj", "embed_tokens"], init="pissa")
    message = r"init=pissa is not defined for model\.embed_tokens.*PEFT starts an embedding's adapter at zero"
    with pytest.raises(ConfigError, match=message) as caught:
        adapted_linears(JobConfig(tuner=asked), untied)
    assert caught.value.hint == f"tuner.targets=[{','.join(leaf_names(untied))}]"
    with pytest.raises(ConfigError, match=message) as caught:
        adapted_linears(JobConfig(tuner=replace(asked, targets=["lm_head", "embed_tokens"])), untied)
    left = caught.value.hint.removeprefix("tuner.targets=[").removesuffix("]").split(",")
    assert "lm_head" in adapted_linears(JobConfig(tuner=replace(asked, targets=left)), untied)


def test_dora_counts_a_magnitude_for_each_row_of_the_head_and_each_column_of_the_embedding() -> None:
    """Of a rank of TP=2: 576 columns; 49152 / 2 rows."""
    untied, ends = replace(SMOLLM2, tied_embeddings=False), frozenset({"lm_head", "model.embed_tokens"})
    assert adapted_linears(JobConfig(tuner=TunerConfig(targets=["lm_head", "embed_tokens"], dora=True)), untied) == ends
    plain = replace(work_of(untied, Topology(tp=2)), adapted=ends)
    counts = [stage_counts(work, 0).trainable for work in (replace(plain, extras=TunerExtras(magnitudes=True)), plain)]
    assert counts[0] - counts[1] == 576 + 24576


def test_experts_in_4_bits_are_counted() -> None:
    """All linears but routers; by hand of one layer."""
    counts = stage_counts(work_of(MOE, Topology(dp=2, ep=2)), 0)
    attention = 64 * 128 + 2 * 64 * 64 + 128 * 64
    assert counts.linears == 6 * attention
    assert counts.expert == 6 * 4 * 3 * 64 * 32
    work = work_of(replace(MOE, expert_ffn=64), Topology(dp=2, ep=2))
    quantised = replace(work, proposal=replace(work.proposal, quantise="nf4"))
    plain, packed = (estimate_memory(each, LAPTOP)[0].weights for each in (work, quantised))
    held = 6 * (attention + 4 * 3 * 64 * 64)
    one_at_a_time = 64 * (128 + 64 + 64) * 4  # q|k|v
    assert plain - packed == pytest.approx(held * (4 - 0.5 - 1 / 64 - 1 / 4096) - one_at_a_time, abs=2)


def test_the_output_layer_learns_by_an_adapter_or_whole() -> None:
    untied = replace(SMOLLM2, tied_embeddings=False)
    assert adapted_linears(JobConfig(tuner=TunerConfig(targets=["lm_head"])), untied) == {"lm_head"}
    assert "lm_head" not in adapted_linears(JobConfig(tuner=TunerConfig(targets="all-linear")), untied)
    both = JobConfig(tuner=TunerConfig(targets=["lm_head"], modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="both name lm_head: it learns whole, or by an adapter") as caught:
        adapted_linears(both, untied)
    assert caught.value.hint == "tuner.modules_to_save=[]"
    assert adapted_linears(JobConfig(tuner=TunerConfig(targets=["embed_tokens"])), SMOLLM2) == {"model.embed_tokens"}
    plus = JobConfig(tuner=TunerConfig(targets=["embed_tokens"], loraplus_lr_ratio=16.0))
    with pytest.raises(ConfigError, match=r"tuner\.loraplus_lr_ratio=16 is not defined for model\.embed_tokens"):
        adapted_linears(plus, SMOLLM2)
    for targets in (["lm_head"], ".*(q_proj|lm_head)"):
        with pytest.raises(ConfigError, match="lm_head is the embedding in this model") as caught:
            adapted_linears(JobConfig(tuner=TunerConfig(targets=targets)), SMOLLM2)
    assert caught.value.hint == "tuner.modules_to_save=[embed_tokens]"


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 16), (True, pytest.approx(8 * 2**0.5))])
def test_pissa_is_written_as_an_adapter_of_twice_the_rank(rslora: bool, alpha: Any) -> None:
    """PEFT's scale of rank 2 r is ours of rank r."""
    config = adapter_config(TunerConfig(r=4, alpha=8.0, rslora=rslora, init="pissa"), ["q_proj"], "base")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, alpha, True)


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2), Topology(pp=2)])
def test_counts_of_magnitudes_and_frozen_weights(topology: Topology) -> None:
    stages = range(topology.pp)
    plain = sum(stage_counts(work_of(QWEN3, topology), stage).trainable for stage in stages)
    dora = work_of(QWEN3, topology, extras=TunerExtras(magnitudes=True))
    rows = 6 * (128 + 64 + 64 + 96 + 96) // topology.tp + 6 * (64 + 64)  # columns-cut; o_proj and down_proj whole
    assert sum(stage_counts(dora, stage).trainable for stage in stages) == plain + rows
    extras = TunerExtras(chosen=frozenset({"model.embed_tokens.weight", "model.layers.5.mlp.down_proj.weight"}))
    full = work_of(QWEN3, topology)
    full = replace(full, proposal=replace(full.proposal, tuner="full"), extras=extras)
    counts = [stage_counts(full, stage) for stage in stages]
    assert sum(each.base - each.trainable for each in counts) == (512 * 64 + 64 * 96) // topology.tp


def test_projected_moments_are_counted() -> None:
    """By hand, of one layer each way of a cut: the projected side cuts the projector, the other one the moments."""
    extras = TunerExtras(galore=GaloreSpec(rank=8))
    full = work_of(QWEN3, Topology(tp=2), tuner="full", precision="bf16", extras=extras)
    whole = {"q": (128, 64), "k": (64, 64), "v": (64, 64), "gate": (96, 64), "up": (96, 64)}  # rows are cut
    numbers = sum(64 * 8 + 2 * 8 * (out // 2) for out, _ in whole.values())  # columns are the shorter side
    numbers += (64 * 8 + 2 * 8 * (128 // 2)) + (64 * 8 + 2 * 8 * (96 // 2))  # o and down: rows projected, columns cut
    linears = (sum(out * width for out, width in whole.values()) + 64 * 128 + 64 * 96) // 2
    counts = stage_counts(full, 0)
    expected = 6 * numbers + 2 * (counts.trainable - 6 * linears)
    assert moment_numbers(full, 0) == expected
    (memory,) = estimate_memory(full, LAPTOP)
    assert memory.optimizer == 4 * expected + 4 * counts.trainable
    frozen = replace(full, extras=replace(extras, chosen=frozenset({"model.layers.5.mlp.down_proj.weight"})))
    assert moment_numbers(full, 0) - moment_numbers(frozen, 0) == 64 * 8 + 2 * 8 * (96 // 2)
    experts = work_of(MOE, Topology(dp=4, ep=2, etp=2), tuner="full", extras=extras)
    assert moment_numbers(experts, 0) < 2 * stage_counts(experts, 0).trainable


def test_what_galore_computes_is_counted() -> None:
    """By hand: every linear of 6 layers has a shorter side of 64; of experts each rank has half, and 4 share them."""
    extras = TunerExtras(galore=GaloreSpec(rank=8, update_steps=50))
    work = work_of(QWEN3, Topology(tp=2, dp=2), tuner="full", extras=extras)
    outs = (128, 64, 64, 128, 96, 96, 96)  # q, k, v, o, gate, up, down: their longer sides
    found = projection(work, 0)
    assert found is not None and found.every == 50
    assert found.step == 6 * 4 * 8 * 64 * sum(outs) / 2
    assert found.gram == 6 * 2 * 64 * 64 * sum(outs) / 4  # tp x dp take turns
    assert found.eigen == 6 * len(outs) * 64**3 / 4
    assert found.held == 3 * 4 * 128 * 64 + 8 * 64 * (5 * 64 + 128)
    assert projection(replace(work, extras=TunerExtras()), 0) is None
    frozen = replace(extras, chosen=frozenset({"model.layers.5.mlp.down_proj.weight"}))
    less = projection(replace(work, extras=frozen), 0)
    assert less is not None and found.eigen - less.eigen == 64**3 / 4
    experts = projection(work_of(MOE, Topology(dp=4, ep=2), tuner="full", extras=extras), 0)
    alone = projection(work_of(MOE, Topology(ep=2, dp=2), tuner="full", extras=extras), 0)
    assert experts is not None and alone is not None and alone.eigen == 2 * experts.eigen


def test_a_plan_knows_what_galore_takes() -> None:
    """Its steps are longer by its products and by a share of what comes every so many steps."""
    extras = TunerExtras(galore=GaloreSpec(rank=8, update_steps=50))
    work = work_of(QWEN3, Topology(), tuner="full")
    rarely = replace(extras, galore=GaloreSpec(rank=8, update_steps=100))
    plain, often, seldom = (
        estimate_time(replace(work, extras=each), LAPTOP) for each in (TunerExtras(), extras, rarely)
    )
    choosing = choosing_s(setup_of(replace(work, extras=extras), LAPTOP))
    assert choosing > 0 and choosing_s(setup_of(work, LAPTOP)) == 0
    assert often.optimizer_s - seldom.optimizer_s == pytest.approx(choosing / 100)
    assert seldom.optimizer_s - choosing / 100 > plain.optimizer_s
    (memory,) = estimate_memory(replace(work, row_tokens=1, extras=extras), LAPTOP)
    held = projection(replace(work, extras=extras), 0)
    assert held is not None and memory.activations + memory.logits + memory.buffers == held.held
    words = [*SMOLLM2_JOB, "tuner=full", "optimizer=galore", "optimizer.galore.update_steps=20"]
    (said,) = (reason for reason in plan_job(compose_job(words)).plan.reasons if "galore" in reason)
    assert said.startswith("optimizer=galore chooses its subspaces every 20 steps, which makes that step about ")
    assert "guess" not in said


def test_a_plan_says_which_adapter() -> None:
    found = planned("tuner=qlora", "tuner.dora=true")
    console = Console(width=120)
    with console.capture() as caught:
        console.print(render(found.plan, found.job, found.model))
    assert "dora on nf4 r=16" in caught.get()
