"""Two jobs of two ranks that are launched at once on one node, again and again; every rank is a process.

argv: FOLDER LAUNCHES. Prints, as JSON, the ports on which the ranks of both jobs have met, for each launch. It forks,
so that torch is imported once.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from datetime import timedelta
from itertools import product
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch.distributed

from launch.environment import RankEnvironment
from launch.meeting import meet

JOBS, RANKS, LIMIT_S = ("a", "b"), 2, 30


def meet_and_note(folder: Path, job: str, number: int, together: Barrier) -> None:
    """Meet the other rank, be sure that it is the right one, and write down on which port."""
    me = RankEnvironment(number, RANKS, number, RANKS)
    store = meet(folder / job, "127.0.0.1", me, timedelta(seconds=LIMIT_S))
    store.set(str(number), job)
    assert store.get(str(1 - number)).decode() == job
    torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=RANKS)
    torch.distributed.all_reduce(total := torch.tensor(JOBS.index(job) + 1))
    assert total.item() == RANKS * (JOBS.index(job) + 1)
    together.wait(LIMIT_S)  # all are open at once
    (folder / f"{job}-{number}").write_text(str(store.port))


def launch(folder: Path) -> list[list[int]]:
    """The ports that each job's ranks have used."""
    folder.mkdir()
    forking = multiprocessing.get_context("fork")
    together = forking.Barrier(len(JOBS) * RANKS)
    ranks = [
        forking.Process(target=meet_and_note, args=(folder, job, number, together))
        for job, number in product(JOBS, range(RANKS))
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks)
    return [[int((folder / f"{job}-{number}").read_text()) for number in range(RANKS)] for job in JOBS]


if __name__ == "__main__":
    print(json.dumps([launch(Path(sys.argv[1]) / str(number)) for number in range(int(sys.argv[2]))]))
