"""The same run with the rows cut over ranks: every comparison of test_parity, with topology.cp above 1."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.engine import IGNORED_LABEL
from parallel.topology import Topology
from tests.distributed.test_parity import assert_same
from tests.helpers import runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

GROUPED = (("num_key_value_heads", 2), ("num_attention_heads", 4))
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "cp2": {"topology": Topology(cp=2)},
    "cp3": {"topology": Topology(cp=3)},
    "cp4": {"topology": Topology(cp=4)},
    "cp4-ulysses": {"topology": Topology(cp=4), "cp_comm": "ulysses"},
    "cp2-dp2-distributed": {"topology": Topology(cp=2, dp=2), "distributed": True},
    "cp2-tp2-sp": {"topology": Topology(cp=2, tp=2), "sp": True},
    "cp2-tp2-ulysses": {"topology": Topology(cp=2, tp=2), "cp_comm": "ulysses"},
    "cp2-pp2": {"topology": Topology(cp=2, pp=2)},
    "cp2-pp2-vpp2": {"topology": Topology(cp=2, pp=2), "vpp": 2},
}
LORA = Run(tokens=24, dropout=0.3, changes=GROUPED)
FULL = Run(tokens=24, full=True, changes=GROUPED)


FINER = ("cp2", "cp3", "cp4-ulysses", "cp2-pp2", "cp2-tp2-ulysses")  # of the topologies: for make grid


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.grid] * (name in FINER)) for name in TOPOLOGIES]
)
def test_lora_with_dropout_on_cut_rows_equals_one_process(pool: Pool, name: str) -> None:
    assert_same(pool, LORA, LORA.on(**TOPOLOGIES[name]))


@pytest.mark.parametrize(
    "name",
    [
        *("cp2-dp2-distributed", "cp2-tp2-sp"),
        *(pytest.param(name, marks=pytest.mark.grid) for name in ("cp2", "cp4-ulysses", "cp2-pp2")),
    ],
)
def test_full_tuning_on_cut_rows_equals_one_process(pool: Pool, name: str) -> None:
    assert_same(pool, FULL, FULL.on(**TOPOLOGIES[name]))


@pytest.mark.parametrize(
    ("recompute", "name"), [("full", "cp2-pp2"), ("full", "cp2-tp2-ulysses"), ("selective", "cp2-pp2-vpp2")]
)
def test_recompute_on_cut_rows_changes_nothing(pool: Pool, recompute: str, name: str) -> None:
    assert_same(pool, LORA, LORA.on(recompute=recompute, **TOPOLOGIES[name]))


@pytest.mark.parametrize("name", [pytest.param("cp2", marks=pytest.mark.grid), "cp2-tp2-sp"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_families_on_cut_rows_equal_one_process(pool: Pool, family: str, name: str) -> None:
    assert_same(pool, Run(family=family), Run(family=family, **TOPOLOGIES[name]))


def test_full_tuning_of_experts_on_cut_rows(pool: Pool) -> None:
    run = Run(family="qwen3_moe", full=True)
    assert_same(pool, run, run.on(topology=Topology(cp=2)))


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_padding_that_the_cut_asks_for_changes_nothing(pool: Pool, kind: str) -> None:
    """Rows of 21 tokens in one process, and padded to 24 on two ranks: what pads comes last, so nothing sees it.

    With eps=1e-6: in these rows one gradient is as small as fp32's rounding, and Adam would divide the rounding by it
    (at 1e-8 tp=2 and dp=2 without any padding miss the tolerance too).
    """
    drawn = [(tokens.tolist(), labels.tolist()) for tokens, labels, _ in runs.global_batch(LORA.on(tokens=21), 0)]
    padded = tuple(((*tokens, 0, 0, 0), (*labels, *[IGNORED_LABEL] * 3)) for tokens, labels in drawn)
    whole = LORA.on(tokens=21, eps=1e-6, rows=tuple((tuple(tokens), tuple(labels)) for tokens, labels in drawn))
    assert_same(pool, whole, LORA.on(eps=1e-6, rows=padded, topology=Topology(cp=2), cp_comm=kind))
