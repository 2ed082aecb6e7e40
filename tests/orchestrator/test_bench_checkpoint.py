"""The benchmark of checkpoints: what its tables say, and that a killed save is really killed and really found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.bench import checkpointing, killing
from orchestrator.bench.checkpointing import Costs, Measured

ROOT = Path(__file__).resolve().parents[2]
KILL = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from orchestrator.bench.killing import MOMENTS, kill_once
places = (Path(sys.argv[1]) / str(number) for number in range(100))
outcomes = []
for number in map(int, sys.argv[2:]):
    place = next(places)
    place.mkdir()
    one = kill_once(place, MOMENTS[number], number % 2 == 0)
    outcomes.append({**asdict(one), "good": one.good})
print(json.dumps(outcomes))
"""


def killed(place: Path, *numbers: int) -> list[dict[str, object]]:
    """Kill at some moments in a process of its own (it forks)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-W", "ignore", "-c", KILL, str(place), *map(str, numbers)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    outcomes: list[dict[str, object]] = json.loads(done.stdout)
    return outcomes


def test_there_are_enough_moments_and_each_has_its_own_words() -> None:
    assert len({moment.words for moment in killing.MOMENTS}) == len(killing.MOMENTS) >= 12


def test_a_save_killed_at_some_moments_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    outcomes = killed(tmp_path, 3, 8, 13, 14, 16)
    assert [one["good"] for one in outcomes] == [True] * 5
    assert [one["latest_step"] for one in outcomes] == [2, 2, 2, 2, 3]
    assert [one["killed"] for one in outcomes] == [True] * 5


@pytest.mark.grid
def test_a_save_killed_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    outcomes = killed(tmp_path, *range(len(killing.MOMENTS)))
    assert [one["words"] for one in outcomes if not one["good"]] == []


def test_a_moment_that_never_comes_is_no_good_outcome() -> None:
    outcome = killing.Outcome("never", 0, False, killed=False, latest_step=3, expected_step=3, left=0, saves_again=True)
    assert not outcome.good and "**fails**" in killing.table([outcome]) and "0 of 1 leave" in killing.table([outcome])


def test_the_table_says_how_much_faster_than_the_faster_peer() -> None:
    nothing = (float("nan"),)
    rows = [
        Measured("isotrain", (2.0, 1.0, 3.0), (1.0,), (2.0,)),
        Measured("torch.distributed.checkpoint", (4.0,), (3.0,), (8.0,)),
        Measured("megatron-core torch_dist", (5.0,), (2.0,), (9.0,)),
        Measured("plain files (the disk)", (0.5,), (0.5,), nothing),
    ]
    text = checkpointing.table(rows, Costs(hash_s=0.5, readback_s=0.25, stall_s=0.1, save_s=2.0), 3_000_000_000)
    assert "| times as fast as the faster peer | 2.00 | 2.00 | 4.00 |" in text
    assert "| plain files (the disk) | 0.50 | 0.50 |  |" in text
    assert "3.00 GB" in text and "medians of 3 rounds" in text and "for 0.100 s, 5% of it" in text
