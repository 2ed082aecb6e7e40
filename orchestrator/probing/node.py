"""The task of a probe on one node: looks, then reduces with others as the first node says, and reports each time."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.probing.clock import clock_offset
from orchestrator.probing.linking import Group, Meeting, measure
from orchestrator.probing.looking import look
from orchestrator.probing.report import Report, read_asked, reports_folder
from orchestrator.runs import write_whole

if TYPE_CHECKING:
    import torch.distributed as dist

ASKED, OVER = "asked", "over"


def answer(run_dir: Path, node: str, meeting: Meeting, clock_port: int) -> int:
    """Answer as one node until the first one says that it is over; returns an exit code."""
    from torch.distributed import TCPStore

    store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timedelta(seconds=60))
    asked = read_asked(store.get(ASKED))
    store.set_timeout(timedelta(seconds=4 * asked.patience_s + 60))  # the slowest node's time, and some more
    report = look(run_dir, node, asked)
    report = _with_clock(report, meeting.host, clock_port)
    number = 0
    _report(store, run_dir, report, number)
    while (text := store.get(round_key(number)).decode()) != OVER:
        mine = next((one for one in read_groups(text) if node in one.nodes), None)
        if mine is not None:
            report = replace(report, links=(*report.links, measure(meeting, mine, node)))
        number += 1
        _report(store, run_dir, report, number)
    return 0


def _with_clock(report: Report, host: str, port: int) -> Report:
    try:
        offset, within = clock_offset(host, port)
    except (OSError, ValueError) as error:  # it has met the first node's store, so that this is no fault of its own
        return replace(report, unread=(*report.unread, f"clock ({error})"))
    return replace(report, clock_s=offset, clock_within_s=within)


def round_key(number: int) -> str:
    """Where the groups of a round are told."""
    return f"round/{number}"


def answer_key(number: int, node: str) -> str:
    """Where a node says what it has found before a round."""
    return f"answer/{number}/{node}"


def groups_text(groups: list[Group]) -> str:
    """Groups as they are told.

    Example:
        >>> groups = [Group("round/0/0", ("n1", "n2"), 8, "cuda", 60.0)]
        >>> read_groups(groups_text(groups)) == groups
        True
    """
    return json.dumps([vars(group) for group in groups])


def read_groups(text: str) -> list[Group]:
    """What :func:`groups_text` has written."""
    return [Group(**{**value, "nodes": tuple(value["nodes"])}) for value in json.loads(text)]


def _report(store: dist.Store, run_dir: Path, report: Report, number: int) -> None:
    """Into the run folder, where that can be written, and to the first node."""
    with suppress(OSError):
        if not report.folder_error:
            write_whole(reports_folder(run_dir) / f"{report.node}.json", report.to_json() + "\n")
    store.set(answer_key(number, report.node), report.to_json())


def leave(code: int) -> None:
    """End this process at once: what hangs in the driver or in the network would hold it."""
    os._exit(code)
