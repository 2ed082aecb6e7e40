"""A certificate is green where the thesis holds, and red for every fault that is planted in the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.certify.command import Cell, Request, certify
from orchestrator.config.loading import compose_job
from tests.distributed import mutations
from tests.helpers.pool import Pool

# The fault, the tuner and the topology on which it must show.
PLANTED: list[tuple[Callable[..., Any], str, str]] = [
    (mutations.fused_adapter_cut_plainly, "lora", "tp2"),
    (mutations.adapters_of_each_rank, "lora", "dp2"),
    (mutations.loss_scaled_by_replicas, "lora", "dp2"),
    (mutations.recompute_cuts_the_graph, "lora", "pp2+recompute"),
    (mutations.lost_all_reduce, "lora", "tp2"),
    (mutations.dropped_sequence_reduction, "lora", "tp2+sp"),
    (mutations.groups_cut_wrongly, "full", "tp2"),
]


def cells(pool: Pool, tuner: str, layout: str, **more: Any) -> dict[str, Cell]:
    """The cells of one tuner on topologies of two processes with ``layout`` in their name, by name."""
    request = Request(compose_job(["model=llama3_8b"]), ranks=2, tuners=(tuner,), only=layout)
    return {cell.layout.name: cell for cell in certify(request, pool=pool, **more)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tuner", "layout"), [("lora", ""), ("full", "pp2")])
def test_two_processes_are_green(pool: Pool, tuner: str, layout: str) -> None:
    found = cells(pool, tuner, layout)
    assert {name: cell.verdict for name, cell in found.items()} == dict.fromkeys(found, "green")
    expected = {"tp2", "tp2+sp", "pp2", "pp2+vpp2", "dp2", "dp2+distributed", "pp2+recompute", "cp2", "cp2+ulysses"}
    assert {name for name in expected if layout in name} | {"one"} <= set(found)
    for name, cell in found.items():
        kinds = {error.what for error in cell.errors}
        assert kinds >= {"gradient", "weight", "logits"} or name == "one"


@pytest.mark.parametrize(("fault", "tuner", "layout"), PLANTED, ids=lambda each: getattr(each, "__name__", str(each)))
def test_a_planted_fault_is_red(pool: Pool, fault: Callable[..., Any], tuner: str, layout: str) -> None:
    found = cells(pool, tuner, layout, train=fault)
    assert found["one"].verdict == "green"
    assert found[layout].verdict == "red" and found[layout].worst, found[layout]


def test_a_rank_that_fails_is_red_and_says_why(pool: Pool) -> None:
    found = cells(pool, "lora", "dp2+distributed", train=mutations.rank_that_fails)
    assert found["dp2+distributed"].verdict == "red"
    assert "the second rank has had enough" in found["dp2+distributed"].reason
