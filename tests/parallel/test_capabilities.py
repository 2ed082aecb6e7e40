"""Capability promises: a layout that cannot run is refused with numbers, and the hint is itself legal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.capabilities import BUILT, Capabilities, Proposal, divisors, legal_tensor_sizes, nearest, refusals
from parallel.specs import ModelSpec
from parallel.topology import Topology

SMOLLM2 = ModelSpec("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, True)
MOE = replace(
    ModelSpec("qwen3_moe", 4, 64, 8, 4, 16, 96, 256, 512, 1e-6, 1e6, False, qk_norm=True),
    experts=6,
    experts_per_token=2,
    expert_ffn=20,
)
EVERYTHING = Capabilities(axes=("tp", "pp", "dp", "cp", "ep", "etp", "vpp"))


def with_hint(proposal: Proposal, hint: str) -> Proposal:
    """The proposal after typing the hint."""
    for assignment in hint.split():
        key, value = assignment.split("=")
        group, _, name = key.rpartition(".")
        parsed = {"null": None, "false": False}.get(value, int(value) if value.isdigit() else value)
        if group == "topology" and name not in ("sp", "vpp", "cp_comm"):
            proposal = replace(proposal, topology=replace(proposal.topology, **{name: parsed}))
        else:
            proposal = replace(proposal, **{name: parsed})
    return proposal


@pytest.mark.parametrize(
    ("model", "proposal", "message", "hint"),
    [
        (
            SMOLLM2,
            Proposal(Topology(tp=2)),
            "model has 9 attention heads and 3 key/value heads, which topology.tp=2 does not divide",
            "topology.tp=3",
        ),
        (
            replace(SMOLLM2, heads=32, kv_heads=2),
            Proposal(Topology(tp=8)),
            "model has 2 key/value heads, which topology.tp=8 does not divide",
            "topology.tp=2",
        ),
        (
            replace(SMOLLM2, ffn=1537, kv_heads=9),
            Proposal(Topology(tp=3)),
            "model has an MLP of 1537 rows, which topology.tp=3 does not divide",
            "topology.tp=1",
        ),
        (
            SMOLLM2,
            Proposal(Topology(pp=31)),
            "model has 30 layers, too few for topology.pp=31 stages",
            "topology.pp=30",
        ),
        (
            SMOLLM2,
            Proposal(Topology(pp=16), vpp=2, global_sequences=16),
            "model has 30 layers, too few for topology.pp=16 x topology.vpp=2 = 32 chunks",
            "topology.pp=30 topology.vpp=null",
        ),
        (SMOLLM2, Proposal(Topology(), vpp=2), "topology.vpp=2 needs topology.pp larger than 1", "topology.vpp=null"),
        (
            SMOLLM2,
            Proposal(Topology(pp=2), vpp=3, global_sequences=3),
            "topology.vpp=3 needs micro-batches in multiples of topology.pp=2, but there are 3 "
            "(batch.global_sequences=3 / dp=1 / micro_sequences=1)",
            "topology.vpp=null",
        ),
        (
            SMOLLM2,
            Proposal(Topology(), sp=True),
            "topology.sp=true needs topology.tp larger than 1, but topology.tp=1",
            "topology.sp=false",
        ),
        (
            SMOLLM2,
            Proposal(Topology(dp=5), global_sequences=8, micro_sequences=2),
            "batch.global_sequences=8 in micro-batches of 2 gives topology.dp=5 ranks only 4",
            "topology.dp=4",
        ),
        (
            SMOLLM2,
            Proposal(Topology(), global_sequences=8, micro_sequences=3),
            "batch.global_sequences=8 is no multiple of batch.micro_sequences=3",
            "batch.micro_sequences=4",
        ),
        (SMOLLM2, Proposal(Topology(dp=2, ep=2), global_sequences=2), "topology.ep=2 needs experts", "topology.ep=1"),
        (
            SMOLLM2,
            Proposal(Topology(dp=2, etp=2), global_sequences=2),
            "topology.etp=2 needs experts",
            "topology.etp=1",
        ),
        (
            replace(SMOLLM2, heads=12, kv_heads=12, ffn=1600),
            Proposal(Topology(tp=4), quantise="nf4"),
            "tuner.quantise=nf4 with topology.tp=4 would cut rows of 768 (o_proj) and 1600 (down_proj) elements inside "
            "a block of 64; legal are 1",
            "topology.tp=1",
        ),
        (
            replace(SMOLLM2, hidden=96),
            Proposal(Topology(), quantise="nf4"),
            "tuner.quantise=nf4 needs rows of whole blocks of 64 elements, but the model's have 96, 576 (o_proj) and",
            "tuner.quantise=null",
        ),
        (
            replace(MOE, hidden=64, heads=4, kv_heads=2, head_dim=32, expert_ffn=384),
            Proposal(Topology(dp=4, etp=4), global_sequences=4, quantise="nf4"),
            "tuner.quantise=nf4 with topology.etp=4 would cut rows of 384 (experts' down_proj) elements inside a block "
            "of 64; legal are 1, 2, 3, 6",
            "topology.etp=3",
        ),
        (
            replace(MOE, hidden=64, heads=4, kv_heads=2, head_dim=32, expert_ffn=96),
            Proposal(Topology(), quantise="nf4"),
            "tuner.quantise=nf4 needs rows of whole blocks of 64 elements, but the model's have 64, 128 (o_proj) and "
            "96 (experts' down_proj)",
            "tuner.quantise=null",
        ),
        (
            MOE,
            Proposal(Topology(dp=4, ep=4), global_sequences=4),
            "model has 6 experts, which topology.ep=4 does not divide",
            "topology.ep=3",
        ),
        (
            MOE,
            Proposal(Topology(dp=3, etp=3), global_sequences=3),
            "model has experts of 20 rows, which topology.etp=3 does not divide",
            "topology.etp=4",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_numbers(
    model: ModelSpec, proposal: Proposal, message: str, hint: str
) -> None:
    found = refusals(model, proposal, EVERYTHING)
    assert [refusal.hint for refusal in found] == [hint]
    assert found[0].message.startswith(message)


@pytest.mark.parametrize(
    ("proposal", "message", "hint"),
    [
        (
            Proposal(Topology(cp=2), cp_comm="ulysses"),
            "topology.cp_comm=ulysses deals out attention heads, but topology.cp=2 does not divide the 9 of a rank",
            "topology.cp_comm=ring",
        ),
        (
            Proposal(Topology(), engine="deepspeed"),
            "engine=deepspeed is not built; there is megatron",
            "engine=megatron",
        ),
        (Proposal(Topology(), tuner="dora"), "tuner=dora is not built; there is lora, full", "tuner=lora"),
        (Proposal(Topology(), recompute="some"), "memory.recompute=some is not built", "memory.recompute=none"),
        (Proposal(Topology(), precision="fp8"), "precision=fp8 is not built; there is fp32, bf16", "precision=fp32"),
    ],
)
def test_what_is_not_built_is_said_and_the_hint_is_legal(proposal: Proposal, message: str, hint: str) -> None:
    (found,) = refusals(SMOLLM2, proposal)
    assert found.message.startswith(message)
    assert found.hint == hint
    assert refusals(SMOLLM2, with_hint(proposal, hint)) == []


def test_a_family_or_sequence_parallelism_that_is_not_built_is_said() -> None:
    without = replace(BUILT, sp=False, families=("llama",))
    (found,) = refusals(SMOLLM2, Proposal(Topology(tp=3), sp=True), without)
    assert (found.message, found.hint) == ("topology.sp=true is not built yet", "topology.sp=false")
    (found,) = refusals(replace(SMOLLM2, family="qwen3"), Proposal(Topology()), without)
    assert found.message == "model family qwen3 is not built; there is llama"


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_the_ring_takes_any_heads_and_ulysses_those_that_it_can_deal_out(cp: int) -> None:
    """Key/value heads fewer than cp are no reason: the ring never cuts them, ulysses sends them more than once."""
    for tp, heads, groups in ((1, 9, 3), (1, 24, 3), (2, 24, 2), (3, 24, 6)):
        model = replace(SMOLLM2, heads=heads, kv_heads=groups)
        assert refusals(model, Proposal(Topology(tp=tp, cp=cp))) == []
        found = refusals(model, Proposal(Topology(tp=tp, cp=cp), cp_comm="ulysses"))
        assert [refusal.hint for refusal in found] == (["topology.cp_comm=ring"] if heads // tp % cp else [])


def test_an_axis_that_is_not_built_is_said() -> None:
    (found,) = refusals(SMOLLM2, Proposal(Topology(cp=2)), replace(BUILT, axes=("tp", "pp", "dp")))
    assert (found.message, found.hint) == ("topology.cp=2 is not built yet: only cp=1 runs", "topology.cp=1")


def test_virtual_chunks_that_are_not_built_are_said() -> None:
    without = replace(BUILT, axes=("tp", "pp", "dp"))
    (found,) = refusals(SMOLLM2, Proposal(Topology(pp=2), vpp=3, global_sequences=2), without)
    assert found.message.startswith("topology.vpp=3 is not built yet")
    assert found.hint == "topology.vpp=null"


MOE = replace(SMOLLM2, family="qwen3_moe", experts=8, experts_per_token=2, expert_ffn=32)


def test_experts_and_tensor_parallelism() -> None:
    (found,) = refusals(MOE, Proposal(Topology(tp=3)))
    assert (found.message, found.hint) == ("experts with topology.tp=3 need topology.sp=true", "topology.sp=true")
    assert refusals(MOE, Proposal(Topology(tp=3), sp=True, tuner="full")) == []


@pytest.mark.parametrize(
    ("topology", "sp"),
    [
        (Topology(dp=8, ep=8), False),
        (Topology(dp=2, etp=2), False),
        (Topology(tp=3, dp=2, ep=2), True),
        (Topology(pp=2, dp=4, ep=2, etp=2), False),
    ],
)
def test_expert_axes_are_built(topology: Topology, sp: bool) -> None:
    proposal = Proposal(topology, sp=sp, global_sequences=8)
    assert refusals(MOE, proposal) == []
    assert [refusal.hint for refusal in refusals(SMOLLM2, proposal) if "needs experts" in refusal.message]


def test_one_expert_per_token_with_normalised_weights_is_refused() -> None:
    (found,) = refusals(replace(MOE, experts_per_token=1), Proposal(Topology()))
    assert found.message.startswith("one expert per token with normalised weights is not built")
    assert refusals(replace(MOE, experts_per_token=1, normalise_expert_weights=False), Proposal(Topology())) == []


@given(
    heads=st.sampled_from([6, 8, 9, 12, 32]),
    tp=st.integers(1, 16),
    pp=st.integers(1, 40),
    dp=st.integers(1, 16),
    rows=st.integers(1, 64),
    micro=st.integers(1, 8),
)
@settings(max_examples=120)
def test_typing_every_hint_in_turn_ends_in_a_legal_layout(
    heads: int, tp: int, pp: int, dp: int, rows: int, micro: int
) -> None:
    model = replace(SMOLLM2, heads=heads, kv_heads=heads // math.gcd(heads, 3))
    proposal = Proposal(Topology(tp=tp, pp=pp, dp=dp), global_sequences=rows, micro_sequences=micro)
    for _ in range(6):
        found = refusals(model, proposal)
        if not found:
            break
        proposal = with_hint(proposal, found[0].hint)
    assert refusals(model, proposal) == []


@given(st.integers(1, 200), st.integers(1, 16))
def test_legal_tensor_sizes_are_exactly_those_that_are_not_refused(scale: int, tp: int) -> None:
    model = replace(SMOLLM2, heads=12, kv_heads=4, ffn=8 * scale)
    legal = tp in legal_tensor_sizes(model)
    assert legal == (refusals(model, Proposal(Topology(tp=tp))) == [])


@given(st.integers(1, 2000))
def test_divisors_are_all_and_ascending(number: int) -> None:
    assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


@given(st.integers(1, 100), st.sets(st.integers(1, 100), min_size=1))
def test_the_nearest_legal_value_is_itself_when_legal(value: int, legal: set[int]) -> None:
    assert nearest(value, legal) in legal
    assert nearest(value, legal | {value}) == value
