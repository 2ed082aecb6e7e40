"""Links of a probe, in real processes: a pair agrees on its figure, and a partner that is not there is no hang."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.jobs.record import slurm_folder
from orchestrator.probing.clock import clock_offset, telling_time
from orchestrator.probing.linking import Group, Meeting, measure
from orchestrator.probing.node import ASKED, OVER, answer, answer_key, groups_text, round_key
from orchestrator.probing.report import Asked, asked_file, read_report, read_reports, reports_folder, write_asked

HERE = "127.0.0.1"


@contextmanager
def opened() -> Iterator[tuple[Meeting, Any]]:
    """A store where ranks meet."""
    from torch.distributed import TCPStore

    store = TCPStore(HERE, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
    yield Meeting(HERE, store.port), store


def test_all_members_of_a_group_have_its_one_figure() -> None:
    nodes = ("n1", "n2", "n3")
    with opened() as (meeting, _), ThreadPoolExecutor(3) as threads:
        group = Group("one", nodes, 1, "cpu", 120.0)
        links = list(threads.map(lambda node: measure(meeting, group, node), nodes))
    assert [link.peers for link in links] == [("n2", "n3"), ("n1", "n3"), ("n1", "n2")]
    assert len({link.rate for link in links}) == 1 and links[0].rate > 0 and not any(link.error for link in links)


def test_a_partner_that_never_comes_is_an_error_and_no_hang() -> None:
    with opened() as (meeting, _):
        link = measure(meeting, Group("two", ("n1", "n2"), 1, "cpu", 4.0), "n1")
    assert (link.peers, link.rate) == (("n2",), 0.0) and link.error


@pytest.mark.parametrize("ahead_s", [0.0, 90.0, -3600.0])
def test_clocks_are_compared_within_what_is_said(ahead_s: float) -> None:
    with telling_time() as port:
        offset, within = clock_offset(HERE, port, lambda: time.time() + ahead_s)
    assert abs(offset - ahead_s) <= within + 1e-5  # the time is told in microseconds


def test_a_clock_that_is_out_of_reach_is_an_error() -> None:
    with telling_time() as port:
        pass
    with pytest.raises(OSError, match="refused"):
        clock_offset(HERE, port)


def test_a_node_reports_before_and_after_each_round_until_it_is_over(tmp_path: Path) -> None:
    for folder in (slurm_folder(tmp_path), reports_folder(tmp_path)):
        folder.mkdir()
    write_asked(tmp_path, Asked("t", patience_s=120.0))
    with opened() as (meeting, store), telling_time() as clock, ThreadPoolExecutor(3) as threads:
        store.set(ASKED, asked_file(tmp_path).read_text())
        nodes = [threads.submit(answer, tmp_path, name, meeting, clock) for name in ("n1", "n2", "n3")]
        for number, text in enumerate((groups_text([Group("r", ("n1", "n2"), 1, "cpu", 120.0)]), OVER)):
            for name in ("n1", "n2", "n3"):
                report = read_report(store.get(answer_key(number, name)))
                assert len(report.links) == (number if name != "n3" else 0)
                assert report.write_mb_s > 0 and abs(report.clock_s) <= report.clock_within_s + 1e-5
            store.set(round_key(number), text)
        assert [node.result(120) for node in nodes] == [0, 0, 0]
    left = {report.node: report.rate for report in read_reports(tmp_path, "t")}
    assert left["n1"] == left["n2"] > 0 and left["n3"] == 0
