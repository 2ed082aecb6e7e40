"""Whether ranks still live and get on: a silent one, and a launch without a new step, are taken for lost.

What the others do then is asked of them, so that the report says who waits for whom, where.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.beat import TELL, Listener, wish
from launch.exits import PEER_LOST, RUN_AGAIN, RankExit
from launch.states import someone_prepares, told_file

LISTEN_EVERY_S = 2.0  # every rank's file is looked at
ANSWER_S = 6.0  # for ranks to say what they do
WAITS = "waits in "  # how a rank's words begin that waits for others
SHOWN_STORIES, SHOWN_RANKS = 4, 8


@dataclass(frozen=True)
class Patience:
    """Seconds: after a rank's bad end until the others are ended, of a rank's silence, and without a new step."""

    last_words_s: float = 3.0
    silent_s: float = 120.0
    stalled_s: float = 1800.0


USUAL = Patience()


@dataclass(frozen=True)
class Hang:
    """Why a launch is taken for lost; ``told``: what ranks do then, by their own words."""

    exit: RankExit
    told: Mapping[int, str]

    def culprit(self, world_size: int) -> int | None:
        """The rank that the others wait for, where it is known: the silent one, or the only one that waits for nobody.

        What a rank of ``world_size`` does that has not said it, or has not come up, is not known.

        Example:
            >>> stalled = RankExit(0, PEER_LOST, "Stalled", "no step was done", "", None, 0.0)
            >>> Hang(stalled, {0: "waits in x", 1: "is at y"}).culprit(2), Hang(stalled, {0: "is at x"}).culprit(2)
            (1, None)
        """
        if self.exit.cause == "Silent":
            return self.exit.rank
        busy = _busy(self.told)
        return busy[0] if len(busy) == 1 and len(self.told) == world_size else None


class Watch:
    """Watches the ranks of one launch from outside of them.

    Args:
        run_dir: the run folder.
        patience: how long what is borne.
        progress: anything that changes when a step is done.
    """

    def __init__(self, run_dir: Path, patience: Patience, progress: Callable[[], object]) -> None:
        self._run_dir = run_dir
        self._patience = patience
        self._progress = progress
        self._listener = Listener(run_dir)
        self._last = (progress(), time.monotonic())
        self._listened = 0.0

    def hang(self) -> Hang | None:
        """The rank that is silent too long, or the whole launch that makes no progress; cheap to ask often."""
        now = time.monotonic()
        if now - self._listened < LISTEN_EVERY_S:
            return None
        self._listened = now
        silent = self._listener.silent_s()
        if silent and max(silent.values()) > self._patience.silent_s:
            rank = max(silent, key=lambda one: silent[one])
            words = f"rank {rank} gives no sign of life for {silent[rank]:.0f} s: stopped, or its node is out of reach"
            return self._hanging("Silent", rank, words, set(silent) - {rank})
        if (state := self._progress()) != self._last[0] or someone_prepares(self._run_dir):
            self._last = (state, now)
        if now - self._last[1] > self._patience.stalled_s:
            words = f"no step was done for {self._patience.stalled_s:.0f} s, though all ranks live"
            return self._hanging("Stalled", 0, words, set(silent))
        return None

    def _hanging(self, cause: str, rank: int, words: str, others: set[int]) -> Hang:
        told = ask(self._run_dir, others)
        if cause == "Stalled" and len(busy := _busy(told)) == 1:
            rank = busy[0]  # the others wait for it
        message = "; ".join([words, *_stories(told)])
        return Hang(RankExit(rank, PEER_LOST, cause, message, RUN_AGAIN, None, time.time()), told)


def ask(run_dir: Path, ranks: set[int]) -> dict[int, str]:
    """What ranks do, by their own words; those that do not answer in time are left out."""
    wish(run_dir, TELL)
    deadline, told = time.monotonic() + ANSWER_S, dict[int, str]()
    while time.monotonic() < deadline and told.keys() != ranks:
        time.sleep(0.1)
        for rank in ranks - told.keys():
            file = told_file(run_dir, rank)
            if file.exists() and (story := file.read_text(encoding="utf-8")):
                told[rank] = story
    return told


def _busy(told: Mapping[int, str]) -> list[int]:
    """The ranks that wait for no other."""
    return [rank for rank, story in sorted(told.items()) if not story.startswith(WAITS)]


def _stories(told: dict[int, str]) -> list[str]:
    """The same stories together: first of those that wait for nobody, and those of most ranks last.

    Example:
        >>> _stories({0: "waits in x", 1: "is at y", 2: "waits in x"}), _stories({0: "waits in x", 1: "is at y"})
        (['rank 1 is at y', 'rank 0, 2 waits in x'], ['rank 1 is at y', 'rank 0 waits in x'])
    """
    ranks: dict[str, list[str]] = {}
    for rank, story in sorted(told.items()):
        ranks.setdefault(story, []).append(str(rank))
    told_by = sorted(ranks.items(), key=lambda one: (one[0].startswith(WAITS), len(one[1])))
    shown = [f"rank {_some(those)} {story}" for story, those in told_by[:SHOWN_STORIES]]
    return shown + ["more in logs/"] * (len(told_by) > SHOWN_STORIES)


def _some(ranks: list[str]) -> str:
    return ", ".join(ranks[:SHOWN_RANKS]) + " ..." * (len(ranks) > SHOWN_RANKS)
