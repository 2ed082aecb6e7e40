"""The same run on every topology: losses to 1e-5 relative, trained tensors to 1e-4 in relative Frobenius norm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.families import read_model
from parallel.specs import read_hf_config
from parallel.topology import Topology
from tests.helpers import runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

LOSS_RTOL, TENSOR_RTOL = 1e-5, 1e-4
DTYPES = ("fp32", "bf16")
FINER = pytest.mark.grid  # cells of `make grid`

TOPOLOGIES = {
    "dp2": {"topology": Topology(dp=2)},
    "tp2": {"topology": Topology(tp=2)},
    "tp3": {"topology": Topology(tp=3)},
    "tp2-sp": {"topology": Topology(tp=2), "sp": True},
    "pp2": {"topology": Topology(pp=2)},
    "pp3-uneven": {"topology": Topology(pp=3)},
    "pp2-dp2": {"topology": Topology(pp=2, dp=2)},
    "tp2-pp2": {"topology": Topology(tp=2, pp=2)},
    "pp2-vpp2": {"topology": Topology(pp=2), "vpp": 2},
    "dp2-distributed": {"topology": Topology(dp=2), "distributed": True},
    "tp2-dp2-distributed": {"topology": Topology(tp=2, dp=2), "distributed": True},
}


def assert_same(pool: Pool, reference: Run, other: Run, base: str | None = None) -> None:
    """Both runs, and every comparison the thesis makes."""
    expected = pool.run(1, runs.train, reference, base)
    found = pool.run(other.topology.world_size, runs.train, other, base)
    for losses, norms, _ in found:
        assert losses == pytest.approx(expected[0][0], rel=LOSS_RTOL)
        assert norms == pytest.approx(expected[0][1], rel=1e-4)
    whole, merged = runs.merge([expected[0][2]]), runs.merge([state for _, _, state in found])
    assert whole.keys() == merged.keys()
    for key, value in whole.items():
        assert torch.linalg.vector_norm(merged[key] - value) <= TENSOR_RTOL * torch.linalg.vector_norm(value), key


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_lora_run_equals_one_process(pool: Pool, name: str) -> None:
    assert_same(pool, Run(), Run(**TOPOLOGIES[name]))


UNEVEN = {
    "dp2": {"topology": Topology(dp=2)},
    "dp3": {"topology": Topology(dp=3), "global_sequences": 4},
    "dp4-distributed": {"topology": Topology(dp=4), "global_sequences": 5, "distributed": True},
    "pp2-dp2": {"topology": Topology(pp=2, dp=2)},
    "cp2-dp2": {"topology": Topology(cp=2, dp=2)},
    "tp2-sp-dp2-recompute": {
        "topology": Topology(tp=2, dp=2),
        "sp": True,
        "recompute": "full",
        "global_sequences": 5,  # with three rows tp=2 alone rounds Adam's moments to 1.5e-4
    },
}


@pytest.mark.parametrize("name", UNEVEN)
def test_micro_batches_without_rows_weigh_nothing(pool: Pool, name: str) -> None:
    """Where dp does not divide the batch; with dropout, whose masks follow samples."""
    run = Run(global_sequences=3, micro_sequences=1, dropout=0.2).on(**UNEVEN[name])
    assert_same(pool, run.on(topology=Topology(), sp=False, distributed=False, recompute="none"), run)


@pytest.mark.parametrize("name", ["tp3", "pp2-dp2", "tp2-dp2-distributed", "tp2-sp"])
def test_full_run_equals_one_process(pool: Pool, name: str) -> None:
    assert_same(pool, Run(full=True, learning_rate=1e-3), Run(full=True, learning_rate=1e-3, **TOPOLOGIES[name]))


@pytest.mark.parametrize("name", [pytest.param("tp2", marks=FINER), "pp2", "tp2-pp2", "tp2-sp"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_equal_one_process(pool: Pool, family: str, name: str) -> None:
    assert_same(pool, Run(family=family), Run(family=family, **TOPOLOGIES[name]))


@pytest.mark.parametrize(
    ("family", "full"),
    [
        ("mistral", False),
        ("gemma2", True),
        ("gemma3_text", False),
        pytest.param("mistral", True, marks=FINER),
        pytest.param("gemma2", False, marks=FINER),
        pytest.param("gemma3_text", True, marks=FINER),
    ],
)
def test_families_with_windows_equal_one_process(
    pool: Pool, tiny_model: Callable[..., Path], family: str, full: bool
) -> None:
    """From weights that attend sharply: our own random ones attend evenly, and gradients of queries are rounding."""
    reference, base = Run(family=family, full=full), str(tiny_model(family))
    assert_same(pool, reference, reference.on(topology=Topology(tp=2, pp=2), sp=True), base)
    assert_same(pool, reference, reference.on(topology=Topology(cp=2, dp=2)), base)
    assert_same(pool, reference, reference.on(topology=Topology(cp=2), cp_comm="ulysses", recompute="full"), base)


@pytest.mark.parametrize("name", ["tp3", "tp2-sp", "pp2-dp2", pytest.param("dp2-distributed", marks=FINER)])
def test_adapters_on_embedding_and_output_layer_equal_one_process(pool: Pool, name: str) -> None:
    """101 entries: rows of the vocabulary that the ranks do not divide."""
    reference = Run("qwen2", targets=("lm_head", "embed_tokens", "q_proj"), dropout=0.2)
    changes = (("num_attention_heads", 6), ("num_key_value_heads", 6))
    assert_same(pool, reference.on(changes=changes), reference.on(changes=changes, **TOPOLOGIES[name]))


@pytest.mark.parametrize(("family", "targets"), [("gemma2", "all-linear"), ("qwen2", ("lm_head", "embed_tokens"))])
def test_16_bits_of_caps_windows_and_ends_stay_near_fp32(
    pool: Pool, tiny_model: Callable[..., Path], family: str, targets: str | tuple[str, ...]
) -> None:
    run = Run(family=family, targets=targets, steps=2)
    wide, narrow = (pool.run(1, runs.train, run.on(precision=each), str(tiny_model(family)))[0] for each in DTYPES)
    assert narrow[0] == pytest.approx(wide[0], rel=2e-2) and narrow[1] == pytest.approx(wide[1], rel=0.2)


@pytest.mark.parametrize("name", ["dp2", "pp2", "tp2-sp"])
def test_adapters_beside_experts_equal_one_process(pool: Pool, name: str) -> None:
    assert_same(pool, Run(family="qwen3_moe"), Run(family="qwen3_moe", **TOPOLOGIES[name]))


@pytest.mark.parametrize("name", ["dp2", "pp2"])
def test_full_tuning_of_experts_equals_one_process(pool: Pool, name: str) -> None:
    reference = Run(family="qwen3_moe", full=True)
    assert_same(pool, reference, reference.on(**TOPOLOGIES[name]))


@pytest.mark.parametrize(
    "name", ["tp2-sp", "dp2", "tp2-pp2", *(pytest.param(each, marks=FINER) for each in ("tp2", "pp2"))]
)
def test_dropout_masks_follow_samples_not_ranks(pool: Pool, name: str) -> None:
    assert_same(pool, Run(dropout=0.3), Run(dropout=0.3, **TOPOLOGIES[name]))


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("name", ["pp2", "tp2"])
def test_recompute_changes_nothing(pool: Pool, recompute: str, name: str) -> None:
    assert_same(pool, Run(dropout=0.2), Run(dropout=0.2, recompute=recompute, **TOPOLOGIES[name]))


@pytest.mark.parametrize("targets", [("q_proj",), ("k_proj", "up_proj"), r".*layers\.[13]\.mlp\.down_proj"])
def test_some_targets_only(pool: Pool, targets: str | tuple[str, ...]) -> None:
    assert_same(pool, Run(targets=targets), Run(targets=targets, topology=Topology(tp=2, pp=2)))


@pytest.mark.parametrize(
    "topologies",
    [
        pytest.param((Topology(tp=3), Topology(pp=2)), id="tp3,pp2"),
        pytest.param((Topology(dp=2),), id="dp2", marks=pytest.mark.grid),
    ],
)
def test_ten_steps_of_smollm2(pool: Pool, smollm2: Path, topologies: tuple[Topology, ...]) -> None:
    """The real model on real rows: 10 steps on TP=3, PP=2 and DP=2 equal one process.

    Adam divides a gradient by its own size, so where one of the 5 million gradients is smaller than fp32's rounding,
    its first update is rounding noise divided by ``eps``. eps=1e-6 and a warm-up keep that below the tolerance.
    """
    config = read_hf_config(smollm2)
    theta = read_model(config).rope_theta
    changes = (*((key, value) for key, value in config.items() if key in runs.TINY), ("rope_theta", theta))
    rows = runs.lighthouse_rows(smollm2, 40, 56)
    run = Run(
        steps=10,
        global_sequences=2,
        micro_sequences=1,
        tokens=56,
        learning_rate=2e-4,
        warmup_steps=4,
        eps=1e-6,
        changes=changes,
        rows=rows,
    )
    losses, _, state = pool.run(1, runs.train, run, str(smollm2))[0]
    whole = runs.merge([state])
    for topology in topologies:
        found = pool.run(topology.world_size, runs.train, run.on(topology=topology), str(smollm2))
        assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
        merged = runs.merge([state for _, _, state in found])
        for key, value in whole.items():
            if key[1] == "weight":
                assert torch.linalg.vector_norm(merged[key] - value) <= TENSOR_RTOL * torch.linalg.vector_norm(value), (
                    key
                )


def test_ten_steps_of_a_tiny_qwen3(pool: Pool) -> None:
    run = Run(family="qwen3", steps=10)
    assert_same(pool, run, run.on(topology=Topology(tp=2, pp=2)))


def test_micro_batches_do_not_change_the_run(pool: Pool) -> None:
    assert_same(pool, Run(micro_sequences=1), Run(micro_sequences=4))


def test_dropout_is_on(pool: Pool) -> None:
    plain, dropped = pool.run(1, runs.train, Run())[0], pool.run(1, runs.train, Run(dropout=0.3))[0]
    assert plain[0][0] == dropped[0][0]  # B starts at zero: the first loss has no adapter in it
    assert plain[1][0] != pytest.approx(dropped[1][0], rel=1e-3)  # but its gradient has


def test_replicas_agree_bit_for_bit(pool: Pool) -> None:
    """merge() compares replicas exactly: dp copies and the replicated halves of adapters may never drift."""
    found = pool.run(4, runs.train, Run(topology=Topology(tp=2, dp=2)))
    assert len(runs.merge([state for _, _, state in found])) == 4 * 7 * 2 * 3
