"""Estimate promises: shards add up to the whole, each axis saves what it should, time ranks as it should; and the shown
plan and the shipped configs say what they mean."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from orchestrator.config.job import ClusterConfig, JobConfig, ModelConfig, TopologyConfig, TunerConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.compute import operators
from orchestrator.planning.counts import Workload, stage_counts
from orchestrator.planning.devices import device
from orchestrator.planning.estimate import OURS, estimate_time
from orchestrator.planning.estimate import estimate_memory as memory_on
from orchestrator.planning.memory import StageMemory
from orchestrator.planning.plan import make_plan
from orchestrator.planning.show import batch_arithmetic, group_rejected, plan_summary, render
from parallel.capabilities import Proposal
from parallel.families import read_model
from parallel.names import resolve_targets
from parallel.specs import ClusterSpec, ModelSpec
from parallel.stages import split_layers
from parallel.topology import Topology

SMOLLM2 = ModelSpec("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, True)
QWEN3 = ModelSpec("qwen3", 6, 64, 8, 4, 16, 96, 512, 256, 1e-6, 1e6, False, qk_norm=True)
MOE = replace(QWEN3, family="qwen3_moe", experts=8, experts_per_token=2, expert_ffn=32)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAPTOP = ClusterSpec("laptop", 1, 4)
CONFIGS = Path(__file__).parents[2] / "configs"


def estimate_memory(work: Workload) -> tuple[StageMemory, ...]:
    return memory_on(work, LAPTOP)


def work_of(model: ModelSpec, topology: Topology, **changes: Any) -> Workload:
    proposal = {"global_sequences": 8, "sp": False, "tuner": "lora", "precision": "fp32", "recompute": "none"}
    proposal |= {"cp_comm": "ring", "distributed": False}
    proposal |= {key: changes.pop(key) for key in list(changes) if key in proposal}
    values: dict[str, Any] = {
        "model": model,
        "proposal": Proposal(topology, **proposal),  # type: ignore[arg-type]
        "stages": split_layers(model.layers, topology.pp),
        "row_tokens": 128,
        "adapted": resolve_targets(ATTENTION if model.is_moe else "all-linear", model),
        "adapter_rank": 4,
        "device": "cpu",
    }
    return Workload(**values | changes)


@pytest.mark.parametrize("model", [SMOLLM2, QWEN3, MOE])
def test_counts_are_those_of_transformers_and_peft(model: ModelSpec) -> None:
    """The whole model on one rank has exactly as many weights as the real one, and the adapter as PEFT's."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.AutoConfig.for_model(
        model.family,
        num_hidden_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.ffn,
        vocab_size=model.vocab,
        tie_word_embeddings=model.tied_embeddings,
        num_experts=model.experts,
        num_experts_per_tok=model.experts_per_token,
        moe_intermediate_size=model.expert_ffn,
    )
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(config)
        counts = stage_counts(work_of(model, Topology()), 0)
        assert counts.base == sum(parameter.numel() for parameter in real.parameters())
        targets = sorted(
            {path.rsplit(".", 1)[1] for path in resolve_targets(ATTENTION if model.is_moe else "all-linear", model)}
        )
        tuned = peft.get_peft_model(real, peft.LoraConfig(r=4, target_modules=targets))
    assert counts.trainable == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize("pp", [2, 3, 6])
def test_stages_hold_the_whole_model_between_them(pp: int, tuner: str) -> None:
    whole = stage_counts(work_of(QWEN3, Topology(), tuner=tuner), 0)
    work = work_of(QWEN3, Topology(pp=pp), tuner=tuner)
    parts = [stage_counts(work, stage) for stage in range(pp)]
    assert sum(part.base for part in parts) == whole.base
    assert sum(part.trainable for part in parts) == whole.trainable
    assert sum(part.matmul for part in parts) == whole.matmul


def test_a_tied_embedding_is_held_twice_under_pipelining() -> None:
    whole = stage_counts(work_of(SMOLLM2, Topology()), 0).base
    work = work_of(SMOLLM2, Topology(pp=2))
    assert sum(stage_counts(work, stage).base for stage in (0, 1)) == whole + SMOLLM2.vocab * SMOLLM2.hidden


def test_tensor_cuts_halve_the_uncut_half_of_an_adapter_only() -> None:
    """One column-parallel and one row-parallel linear, by hand: A of q and B of o stay whole."""
    adapted = resolve_targets(["q_proj", "o_proj"], QWEN3)
    counts = stage_counts(work_of(QWEN3, Topology(tp=2), adapted=adapted), 0)
    query = QWEN3.heads * QWEN3.head_dim
    assert counts.trainable == QWEN3.layers * 4 * ((QWEN3.hidden + query // 2) + (query // 2 + QWEN3.hidden))


def test_experts_are_cut_over_ep_and_etp_and_replicated_over_the_rest() -> None:
    """By hand: of 8 experts a rank holds 8 / ep, of each 1 / etp; an adapter's uncut half stays whole."""
    targets = ["gate", "gate_proj", "up_proj", "down_proj"]
    adapted = resolve_targets(targets, MOE)
    whole = stage_counts(work_of(MOE, Topology(), adapted=adapted), 0)
    hidden, ffn, experts, r = MOE.hidden, MOE.expert_ffn, MOE.experts, 4
    expert = 2 * r * (hidden + ffn) + r * (ffn + hidden)
    router = r * (hidden + experts)
    assert whole.expert_trainable == MOE.layers * experts * expert
    assert whole.trainable == whole.expert_trainable + MOE.layers * router
    cut = stage_counts(work_of(MOE, Topology(dp=4, ep=2, etp=2), adapted=adapted), 0)
    half = 2 * r * (hidden + ffn // 2) + r * (ffn // 2 + hidden)
    assert cut.expert_trainable == MOE.layers * experts // 2 * half
    assert cut.trainable - cut.expert_trainable == MOE.layers * router
    assert whole.base - cut.base == MOE.layers * (experts - experts // 4) * 3 * hidden * ffn


def test_a_distributed_optimizer_cuts_experts_over_their_own_replicas() -> None:
    changes = {"tuner": "full", "distributed": True}
    work = work_of(MOE, Topology(dp=4, ep=4), **changes)
    counts, (memory,) = stage_counts(work, 0), estimate_memory(work)
    dense = counts.trainable - counts.expert_trainable
    assert memory.optimizer == 8 * dense // 4 + 8 * counts.expert_trainable
    (replicated,) = estimate_memory(work_of(MOE, Topology(dp=4), **changes))
    assert replicated.weights > memory.weights and replicated.gradients > memory.gradients


def test_memory_by_owner_is_what_the_formulas_say() -> None:
    work = work_of(QWEN3, Topology(dp=4), precision="bf16", distributed=True)
    counts = stage_counts(work, 0)
    (memory,) = estimate_memory(work)
    assert memory.weights == 2 * counts.base
    # adapters are fp32 in a bf16 model too, and their own master weights
    assert memory.adapters == memory.gradients == 4 * counts.trainable
    assert memory.optimizer == 8 * counts.trainable // 4
    assert memory.logits == 128 * QWEN3.vocab * (2 + 8)
    assert memory.total == sum(asdict(memory).values())
    (full,) = estimate_memory(work_of(QWEN3, Topology(), tuner="full"))
    assert (full.adapters, full.gradients, full.optimizer) == (0, 4 * counts.base, 8 * counts.base)
    (half,) = estimate_memory(work_of(QWEN3, Topology(), tuner="full", precision="bf16"))
    assert (half.weights, half.gradients, half.optimizer) == (2 * counts.base, 4 * counts.base, 12 * counts.base)


def test_a_frozen_model_has_no_gradients_and_no_optimizer_state() -> None:
    (memory,) = estimate_memory(work_of(QWEN3, Topology(), adapted=frozenset()))
    assert (memory.adapters, memory.gradients, memory.optimizer) == (0, 0, 0)


def test_earlier_stages_hold_more_micro_batches_but_never_more_than_there_are() -> None:
    deep = estimate_memory(work_of(QWEN3, Topology(pp=3), global_sequences=8))
    one = estimate_memory(work_of(QWEN3, Topology(pp=3), global_sequences=1))
    assert [stage.activations for stage in deep[:2]] == [3 * one[0].activations, 2 * one[1].activations]
    assert deep[2].activations == one[2].activations
    # the first norm keeps nothing over a frozen embedding, and the last stage has one more
    assert one[0].activations < one[1].activations < one[2].activations < 1.1 * one[0].activations
    assert [stage.logits > 0 for stage in deep] == [False, False, True]


@pytest.mark.parametrize("model", [QWEN3, MOE])
def test_each_saving_saves(model: ModelSpec) -> None:
    def total(topology: Topology, **changes: Any) -> int:
        return max(stage.total for stage in estimate_memory(work_of(model, topology, row_tokens=2048, **changes)))

    plain = total(Topology(tp=2))
    assert plain < total(Topology())
    assert total(Topology(tp=2), sp=True) < plain
    assert total(Topology(tp=2), recompute="full") < plain
    assert total(Topology(tp=2), precision="bf16") < plain
    assert total(Topology(dp=4), distributed=True) < total(Topology(dp=4))


def test_cutting_rows_cuts_what_grows_with_them() -> None:
    (whole,) = estimate_memory(work_of(QWEN3, Topology(cp=2), distributed=True, tuner="full", adapted=frozenset()))
    (cut,) = estimate_memory(work_of(QWEN3, Topology(cp=8), distributed=True, tuner="full", adapted=frozenset()))
    assert (4 * cut.activations, 4 * cut.logits, 4 * cut.optimizer) == pytest.approx(
        (whole.activations, whole.logits, whole.optimizer), rel=1e-3
    )
    assert (cut.weights, cut.gradients) == (whole.weights, whole.gradients)


def test_ranks_that_share_rows_talk_and_more_so_across_nodes() -> None:
    near, far = ClusterSpec("near", 1, 4), ClusterSpec("far", 2, 2)
    alone = estimate_time(work_of(QWEN3, Topology(dp=4)), near)
    assert alone.context_s == 0
    for kind in ("ring", "ulysses"):
        work = work_of(QWEN3, Topology(cp=4), cp_comm=kind)
        here, there = estimate_time(work, near), estimate_time(work, far)
        assert 0 < here.context_s < there.context_s
        # weights are read by every rank, so a quarter of the tokens take a little more than a quarter of the time
        assert 1 / 4 < here.compute_s / estimate_time(work_of(QWEN3, Topology()), near).compute_s < 1 / 3
        # as many ranks share the gradients of what is trained as with dp=4
        assert here.data_s == alone.data_s
        again = estimate_time(work_of(QWEN3, Topology(cp=4), cp_comm=kind, recompute="full"), near)
        assert again.context_s > here.context_s


def test_a_hop_of_the_ring_by_hand() -> None:
    """Two ranks, 64 of 128 tokens each: a hop forward, one backward, and two of the fp32 gradients."""
    time = estimate_time(work_of(QWEN3, Topology(cp=2), global_sequences=1), LAPTOP)
    bytes_per_hop = 64 * 2 * QWEN3.kv_heads * QWEN3.head_dim * 4
    assert time.context_s == pytest.approx(QWEN3.layers * 4 * (bytes_per_hop / 5e8 + 1.5e-3))


def test_time_prefers_dp_to_pp_to_tp_on_one_cpu_host() -> None:
    light_head = replace(SMOLLM2, heads=8, kv_heads=4, vocab=1024)  # so that even stages are balanced
    plan = make_plan(JobConfig(), light_head, LAPTOP)
    steps = {one.topology: one.step_s for one in plan.rejected if one.step_s}
    assert plan.topology == Topology(dp=4)
    assert steps["pp=2 dp=2 cp=1 tp=1"] < steps["pp=1 dp=2 cp=1 tp=2"]


def test_the_bubble_is_a_share_of_pp_minus_one_over_the_micro_batches() -> None:
    headless = replace(QWEN3, vocab=1)
    time = estimate_time(work_of(headless, Topology(pp=3), global_sequences=6), LAPTOP)
    assert time.bubble_s == pytest.approx(time.compute_s * 2 / 6, rel=0.02)
    assert estimate_time(work_of(QWEN3, Topology()), LAPTOP).bubble_s == 0


def test_a_quantised_base_is_made_whole_for_every_product() -> None:
    def seconds(quantise: str | None, recompute: str = "none", tp: int = 1) -> float:
        work = work_of(QWEN3, Topology(tp=tp), recompute=recompute)
        work = replace(work, proposal=replace(work.proposal, quantise=quantise))
        time = estimate_time(work, LAPTOP)
        return time.memory_s + time.recompute_s

    heads = QWEN3.heads * QWEN3.head_dim + QWEN3.kv_heads * QWEN3.head_dim
    elements = QWEN3.layers * (2 * QWEN3.hidden * heads + 3 * QWEN3.hidden * QWEN3.ffn)
    once = 8 * elements * (16.5 + 4) / device("cpu").memory_rate  # 8 micro-batches, by operators of torch in fp32
    assert seconds("nf4") - seconds(None) == pytest.approx(2 * once)  # forward and backward
    assert seconds("nf4", tp=2) - seconds(None, tp=2) == pytest.approx(once)
    assert seconds("nf4", "full") - seconds(None, "full") == pytest.approx(3 * once)


def test_dora_launches_more_operators_than_lora() -> None:
    assert operators(OURS, 7, dora=True) > operators(OURS, 7) > operators(OURS, 0)


def test_tensor_parallelism_across_nodes_costs_more() -> None:
    work = work_of(QWEN3, Topology(tp=4))
    near = estimate_time(work, ClusterSpec("near", 1, 4))
    far = estimate_time(work, ClusterSpec("far", 2, 2))
    assert far.tensor_s > near.tensor_s and far.compute_s == near.compute_s


def text_of(job: JobConfig) -> str:
    console = Console(width=200, record=True, quiet=True)
    plan = make_plan(job, SMOLLM2, LAPTOP)
    with console.capture() as captured:
        console.quiet = False
        console.print(render(plan, job, SMOLLM2))
    return captured.get()


def test_the_terminal_shows_topology_arithmetic_memory_reasons_and_rejections() -> None:
    text = text_of(JobConfig(topology=TopologyConfig(pp=2)))
    for expected in (
        "topology  pp=2 dp=2 cp=1 tp=1 = 4 ranks",
        "8 sequences = 2 dp x 4 micro-batches x 1",
        "estimated MiB per rank",
        "asked for: topology.pp=2",
        "pp=2 dp=1 cp=1 tp=2: model has 9 attention heads and 3 key/value heads, which topology.tp=2 does not divide",
    ):
        assert expected in text
    assert "1 idle" in text_of(JobConfig(topology=TopologyConfig(tp=3, sp=True)))
    assert "padded to multiples of 3" in text_of(JobConfig(topology=TopologyConfig(tp=3, sp=True)))


def test_rejections_are_grouped_by_reason() -> None:
    plan = make_plan(JobConfig(), SMOLLM2, LAPTOP)
    groups = dict(group_rejected(plan))
    assert sum(map(len, groups.values())) == len(plan.rejected)
    assert len(groups["slower"]) == 4 and "pp=2 dp=2 cp=1 tp=1 (" in " ".join(groups["slower"])


def test_the_summary_for_machines_is_plain_json() -> None:
    plan = make_plan(JobConfig(), SMOLLM2, LAPTOP)
    summary = json.loads(json.dumps(plan_summary(plan, JobConfig(), SMOLLM2)))
    assert summary["topology"] == {"pp": 1, "dp": 4, "cp": 1, "tp": 1, "ep": 1, "etp": 1}
    assert summary["batch"] == batch_arithmetic(plan) == "8 sequences = 4 dp x 2 micro-batches x 1"
    assert summary["memory_gib_per_rank"][0] > 0 and summary["estimated_step_s"] > 0


@pytest.mark.parametrize(
    ("group", "value"), [("cluster", ClusterConfig), ("model", ModelConfig), ("topology", TopologyConfig)]
)
def test_shipped_configs_state_their_purpose_and_hold_the_fields_of_their_group(group: str, value: type) -> None:
    files = sorted((CONFIGS / group).glob("*.yaml"))
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path
        # what Slurm is asked for is said by clusters that are Slurm's, and a profile named by whoever has measured one
        own = {"slurm", "profile", "fewest_nodes"}
        assert set(yaml.safe_load(text)) | own == {field.name for field in fields(value)} | own, path


@pytest.mark.parametrize("model", [path.stem for path in sorted((CONFIGS / "model").glob("*.yaml"))])
@pytest.mark.parametrize("cluster", [path.stem for path in sorted((CONFIGS / "cluster").glob("*.yaml"))])
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_every_shipped_model_and_cluster_has_a_plan_or_an_error_with_a_hint(
    model: str, cluster: str, tuner: str
) -> None:
    keys = yaml.safe_load((CONFIGS / "model" / f"{model}.yaml").read_text(encoding="utf-8"))["config"]
    if keys is None:
        return
    spec = read_model(keys)
    values = yaml.safe_load((CONFIGS / "cluster" / f"{cluster}.yaml").read_text(encoding="utf-8"))
    machine = ClusterSpec(**{key: value for key, value in values.items() if key != "slurm"})
    try:
        plan = make_plan(JobConfig(tuner=TunerConfig(name=tuner)), spec, machine)
    except ConfigError as error:
        assert error.hint and "=" in error.hint
    else:
        assert plan.ranks_used <= machine.ranks
