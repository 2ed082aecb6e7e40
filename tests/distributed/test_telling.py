"""What a rank says that it does, seen from another of its threads while it waits for its peer."""

from __future__ import annotations

import re
import sys
import threading
import time

import torch
import torch.distributed as dist

from orchestrator.telling import story
from parallel.groups import open_groups
from parallel.topology import Topology
from tests.helpers.pool import Pool


def wait_for_peer(rank_s: tuple[float, float]) -> list[str]:
    """Meet over tp after so many seconds; what this rank was seen to do on the way."""
    groups = open_groups(Topology(tp=2), dist.get_rank())
    main, seen = threading.get_ident(), list[str]()

    def look() -> None:
        time.sleep(0.5)
        seen.append(story(sys._current_frames()[main]))

    looking = threading.Thread(target=look)
    looking.start()
    time.sleep(rank_s[dist.get_rank()])
    dist.all_reduce(torch.ones(1), group=groups.by_name["tp"])
    looking.join()
    groups.close()
    return seen


def test_a_rank_says_which_collective_of_which_group_it_waits_in(pool: Pool) -> None:
    (waiting,), (late,) = pool.run(2, wait_for_peer, (0.0, 1.5))
    place = r"at tests/distributed/test_telling\.py:\d+ in wait_for_peer"
    assert re.fullmatch(rf"waits in all_reduce of tp \(ranks 0, 1\) {place}", waiting)
    assert re.fullmatch(rf"is {place}", late)


def test_a_wait_for_what_was_only_started_is_one_too() -> None:
    started: torch.futures.Future[int] = torch.futures.Future()
    waiting = threading.Thread(target=lambda: started.wait())
    waiting.start()
    seen = ""
    while waiting.is_alive() and "waits in wait" not in seen:
        seen = story(sys._current_frames()[waiting.ident or 0])
    started.set_result(1)
    waiting.join()
    assert re.fullmatch(r"waits in wait at tests/distributed/test_telling\.py:\d+ in <lambda>", seen)
