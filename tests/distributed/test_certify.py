"""A certificate is green where the thesis holds, and red for every fault that is planted in the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest

from orchestrator.certify import command
from orchestrator.certify.command import Cell, Request, certify
from orchestrator.certify.grid import Layout, layouts
from orchestrator.config.loading import compose_job
from tests.distributed import mutations
from tests.helpers.pool import Pool

DENSE, EXPERTS = "llama3_8b", "qwen3_30b_a3b"
# The fault, the tuner and the topology on which it must show.
PLANTED: list[tuple[Callable[..., Any], str, str]] = [
    (mutations.fused_adapter_cut_plainly, "lora", "tp2"),
    (mutations.adapters_of_each_rank, "lora", "dp2"),
    (mutations.loss_scaled_by_replicas, "lora", "dp2"),
    (mutations.recompute_cuts_the_graph, "lora", "pp2+recompute"),
    (mutations.lost_all_reduce, "lora", "tp2"),
    (mutations.dropped_sequence_reduction, "lora", "tp2+sp"),
    (mutations.groups_cut_wrongly, "full", "tp2"),
    (mutations.one_adapter_per_expert_rank, "lora", "dp2·ep2"),
    (mutations.expert_shares_not_summed, "lora", "dp2·etp2"),
    (mutations.positions_of_each_rank, "lora", "cp2"),
    (mutations.subspace_of_parts_in_another_order, "galore", "tp2"),
    (mutations.directions_in_another_order, "galore", "dp2"),
]


FINER = pytest.mark.grid


def cells(pool: Pool, tuner: str, layout: str, ranks: int = 2, **more: Any) -> dict[str, Cell]:
    """The cells of one tuner on topologies of so many processes with ``layout`` in their name, by name."""
    job = compose_job([f"model={EXPERTS if 'ep2' in layout or 'etp2' in layout else DENSE}"])
    request = Request(job, ranks=ranks, tuners=(tuner,), only=layout)
    return {cell.layout.name: cell for cell in certify(request, pool=pool, **more)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("tuner", "layout", "ranks", "cells_there"),
    [
        ("lora", "tp2·pp2+all", 4, {"tp2·pp2+all"}),
        ("full", "tp2·dp2+all", 4, {"tp2·dp2+all"}),
        ("lora", "dp2·ep2", 2, {"dp2·ep2", "dp2·ep2+distributed"}),
        ("qlora", "tp2+sp", 2, {"tp2+sp"}),
        ("galore", "tp2·pp2+sp", 4, {"tp2·pp2+sp"}),
        pytest.param("lora", "cp2", 2, {"cp2", "cp2+ulysses", "cp2+distributed", "cp2+recompute"}, marks=FINER),
        pytest.param("full", "pp2", 2, {"pp2", "pp2+vpp2", "pp2+recompute"}, marks=FINER),
    ],
)
def test_what_is_right_is_green(pool: Pool, tuner: str, layout: str, ranks: int, cells_there: set[str]) -> None:
    found = cells(pool, tuner, layout, ranks)
    assert {name: cell.verdict for name, cell in found.items()} == dict.fromkeys(cells_there | {"one"}, "green")
    for name in cells_there:
        assert {error.what for error in found[name].errors} >= {"gradient", "weight", "logits"}, name
    for name, cell in found.items():
        kinds = {error.what for error in cell.errors}
        assert kinds >= {"gradient", "weight", "logits"} or name == "one"


@pytest.mark.parametrize(("fault", "tuner", "layout"), PLANTED, ids=lambda each: getattr(each, "__name__", str(each)))
def test_a_planted_fault_is_red(pool: Pool, fault: Callable[..., Any], tuner: str, layout: str) -> None:
    def alone(ranks: int, moe: bool) -> list[Layout]:
        return [one for one in layouts(ranks, moe) if one.name == layout]

    with patch.object(command, "layouts", alone):
        found = cells(pool, tuner, layout, train=fault)
    assert found["one"].verdict == "green"
    assert found[layout].verdict == "red", found[layout]
    replicas = "should be the same on ranks" in found[layout].reason  # a save has compared them before the certificate
    assert found[layout].worst or replicas, found[layout]


def test_what_is_wrong_everywhere_alike_is_red_by_what_transformers_says(pool: Pool) -> None:
    found = cells(pool, "full", "dp2+distributed", train=mutations.wrong_rotary_base)
    worst = found["one"].worst
    assert found["one"].verdict == "red" and worst is not None and worst.what == "logits"
    assert (found["dp2+distributed"].verdict, found["dp2+distributed"].reason) == (
        "refused",
        "one process is red itself",
    )


def test_a_rank_that_fails_is_red_and_says_why(pool: Pool) -> None:
    found = cells(pool, "lora", "dp2+distributed", train=mutations.rank_that_fails)
    assert found["dp2+distributed"].verdict == "red"
    assert "the second rank has had enough" in found["dp2+distributed"].reason


def test_what_is_known_is_not_trained_again_and_each_other_cell_is_told_of(pool: Pool) -> None:
    told: list[Cell] = []
    known = {("lora", "dp2"): Cell("lora", Layout("dp2", (), 2), "green", reason="from before")}
    found = cells(pool, "lora", "dp2", known=known, keep=told.append)
    assert found["dp2"] is known["lora", "dp2"] and {cell.verdict for cell in found.values()} == {"green"}
    assert {cell.layout.name for cell in told} == found.keys() - {"dp2"}
