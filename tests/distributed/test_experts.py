"""Experts on every topology: what EP, ETP, TP with SP, PP and DP do to a run is nothing, to the usual tolerances."""

from __future__ import annotations

import pytest

from parallel.topology import Topology
from tests.distributed.test_parity import assert_same
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")
TOPOLOGIES = {
    "ep2": {"topology": Topology(dp=2, ep=2)},
    "ep4": {"topology": Topology(dp=4, ep=4)},
    "ep2-dp4": {"topology": Topology(dp=4, ep=2)},
    "etp2-dp2": {"topology": Topology(dp=2, etp=2)},
    "tp2-etp1": {"topology": Topology(tp=2), "sp": True},
    "tp2-etp2": {"topology": Topology(tp=2, etp=2), "sp": True},
    "tp2-ep2": {"topology": Topology(tp=2, ep=2), "sp": True},
    "tp2-dp2-ep2": {"topology": Topology(tp=2, dp=2, ep=2), "sp": True},
    "tp2-dp2-ep2-etp2": {"topology": Topology(tp=2, dp=2, ep=2, etp=2), "sp": True},
    "pp2-dp2-ep2": {"topology": Topology(pp=2, dp=2, ep=2)},
    "dp4-ep2-distributed": {"topology": Topology(dp=4, ep=2), "distributed": True},
    "tp2-dp2-etp2-distributed": {"topology": Topology(tp=2, dp=2, etp=2), "sp": True, "distributed": True},
}


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("what", ["attention", "experts", "full"])
def test_a_run_equals_one_process(pool: Pool, what: str, name: str) -> None:
    changes = {"attention": {"targets": ATTENTION}, "experts": {"targets": EXPERTS}, "full": {"full": True}}[what]
    run = Run(family="qwen3_moe", **changes)
    assert_same(pool, run, run.on(**TOPOLOGIES[name]))
