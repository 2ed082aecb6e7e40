"""Points of a sweep that train in turns on one base: each is bit for bit the run that it is alone, whatever the others
do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.commands import plan_job
from orchestrator.config.loading import compose_job
from orchestrator.errors import ExitCode, Rewound
from orchestrator.runs import write_run
from parallel.topology import Topology
from tests.end_to_end.conftest import TinyRun, make_tiny_run, write_chat
from tests.end_to_end.shell import Folder, tensors
from tests.helpers.pool import Pool, RankError

PLACES = {"one": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {"dp": 2}}


class StopsLater:
    """A wish to stop that is there from the n-th time on that it is asked for; 0: never."""

    def __init__(self, first: int) -> None:
        self._first, self._asked = first, 0

    @property
    def requested(self) -> bool:
        self._asked += 1
        return 0 < self._first <= self._asked


def alone(run_dir: str, cache: str) -> int:
    """Train one run as its ranks do when it has a launch for itself; again after every way back."""
    from orchestrator.loop import train
    from orchestrator.opening import base_of, close_run, open_run, read_asked

    asked = read_asked(Path(run_dir))
    world = _world(Path(run_dir), asked.plan.topology, cache, 0)
    code = None
    while code is None:
        run, start = open_run(world, asked, base_of(world, asked.job), None)  # type: ignore[arg-type]
        try:
            code = int(train(run, start, world.stop))
        except Rewound:
            pass
        finally:
            close_run(run)
            run.engine.close()
    world.groups.close()
    return code


def in_turns(run_dirs: Sequence[str], cache: str, stop_after: int = 0) -> int:
    """Train all of them in turns; ``stop_after``: asked to stop at the so-many-th step of all together."""
    from orchestrator.opening import read_asked
    from orchestrator.sweeps.turns import train_in_turns

    folders = [Path(run_dir) for run_dir in run_dirs]
    world = _world(folders[0].parent, read_asked(folders[0]).plan.topology, cache, stop_after)
    code = int(train_in_turns(world, folders))
    world.groups.close()
    return code


def _world(folder: Path, topology: Topology, cache: str, stop_after: int) -> Any:
    from orchestrator.opening import join_world, this_rank

    os.environ["ISOTRAIN_CACHE"] = cache
    return replace(join_world(this_rank(), folder, topology), stop=StopsLater(stop_after))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A model of 4 layers and 6 heads, and 20 rows of chat."""
    return make_tiny_run(tmp_path_factory.mktemp("turns"))


def written(tiny: TinyRun, run_dir: Path, place: dict[str, int], **changes: object) -> Folder:
    """A run folder as it is when ranks start."""
    sizes = {f"topology__{axis}": place.get(axis, 1) for axis in ("tp", "pp", "dp")}
    words = tiny.words(cluster="laptop", metrics__progress="false", **{**sizes, **changes}, run_dir=run_dir)
    job = compose_job(words)
    write_run(run_dir, job, plan_job(job).plan.to_json())
    return Folder(run_dir)


def both(tiny: TinyRun, folder: Path, place: dict[str, int], points: Sequence[dict[str, object]]) -> Any:
    """The same points in two folders each: alone, and in turns."""
    return [
        [written(tiny, folder / kind / f"{number:03d}", place, **point) for number, point in enumerate(points)]
        for kind in ("alone", "turns")
    ]


def assert_same_run(ours: Folder, theirs: Folder) -> None:
    """Losses, norms, rates, and every tensor and counter of the last checkpoint are equal, bit for bit."""
    for step, line in theirs.metrics.items():
        for name in ("loss", "grad_norm", "learning_rate", "tokens"):
            assert ours.metrics[step][name] == line[name], (step, name)
    assert ours.steps == theirs.steps and ours.metrics.keys() == theirs.metrics.keys()
    last, expected = ours.checkpoint(ours.steps[-1]), theirs.checkpoint(theirs.steps[-1])
    files = sorted(file.relative_to(expected) for file in expected.rglob("*.safetensors"))
    assert files
    for file in files:
        one, other = tensors(last / file), tensors(expected / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other), file
    assert json.loads((last / "state.json").read_text()) == json.loads((expected / "state.json").read_text())


@pytest.mark.parametrize(
    "place", ["tp2", *(pytest.param(place, marks=pytest.mark.grid) for place in ("one", "pp2", "dp2"))]
)
def test_points_in_turns_are_the_runs_that_they_are_alone(
    pool: Pool, tiny: TinyRun, tmp_path: Path, place: str
) -> None:
    """Three adapters of other ranks, rates, schedules, dropout, data and orders; stopped in the middle and gone on."""
    other = write_chat(tmp_path / "other.jsonl", 11)
    points: list[dict[str, object]] = [
        {"tuner__r": 2, "optimizer__schedule": "constant"},
        {"tuner__dropout": 0.3, "seed": 4, "tuner__targets": "[q_proj,down_proj]", "steps": 7},
        {"data__path": other, "optimizer__lr": 0.003, "batch__global_sequences": 2, "steps": 4},
    ]
    theirs, ours = both(tiny, tmp_path, PLACES[place], points)
    cache, ranks = str(tmp_path / "cache"), 1 if place == "one" else 2
    for run in theirs:
        assert pool.run(ranks, alone, str(run.path), cache) == [0] * ranks
    folders = [str(run.path) for run in ours]
    assert pool.run(ranks, in_turns, folders, cache, 5) == [int(ExitCode.INTERRUPTED)] * ranks
    assert [run.exits[0]["code"] for run in ours] == [85, 85, 85]
    for run in ours:
        shutil.rmtree(run.path / "exits")  # as the command does before it starts ranks
    assert pool.run(ranks, in_turns, folders, cache) == [0] * ranks
    for one, run in zip(ours, theirs, strict=True):
        assert one.exits[0]["code"] == 0
        extra = set(one.steps) - set(run.steps)  # saved where it was stopped
        for step in extra:
            shutil.rmtree(one.checkpoint(step))
        assert_same_run(one, run)


def test_a_point_that_gives_up_or_goes_back_leaves_the_others_alone(pool: Pool, tiny: TinyRun, tmp_path: Path) -> None:
    """One whose loss is no number stops (93); one that always goes back is given up; one goes back past its spikes."""
    back = {"anomalies__spike": "rewind", "anomalies__spike_factor": 1.001, "checkpoint__every_steps": 1}
    points: list[dict[str, object]] = [
        {},
        {"optimizer__lr": 1e30, "seed": 1},
        {"optimizer__lr": 1e30, "anomalies__not_finite": "rewind", "recovery__restarts": 2},
        {**back, "steps": 14, "recovery__restarts": 30, "batch__global_sequences": 2, "optimizer__lr": 1e-5},
    ]
    theirs, ours = both(tiny, tmp_path, {}, points)
    cache = str(tmp_path / "cache")
    for number in (0, 3):
        assert pool.run(1, alone, str(theirs[number].path), cache) == [0]
    assert pool.run(1, in_turns, [str(run.path) for run in ours], cache) == [0]
    assert [run.exits[0]["code"] for run in ours] == [0, 93, 93, 0]
    assert "step 2: loss nan" in ours[1].exits[0]["message"] and "isotrain resume" in ours[1].exits[0]["hint"]
    assert "3 times without a new checkpoint after step 0: given up" in ours[2].exits[0]["message"]
    assert (ours[3].path / "rewinds.json").read_text() == (theirs[3].path / "rewinds.json").read_text()
    for number in (0, 3):
        assert_same_run(ours[number], theirs[number])


def test_a_point_whose_data_are_bad_says_so_in_its_own_folder(pool: Pool, tiny: TinyRun, tmp_path: Path) -> None:
    """All ranks end, so that they are started again without it; the next start leaves it out."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{no JSON\n")
    points: list[dict[str, object]] = [{"steps": 2}, {"data__path": bad}]
    ours = [written(tiny, tmp_path / f"00{number}", {}, **point) for number, point in enumerate(points)]
    folders, cache = [str(run.path) for run in ours], str(tmp_path / "cache")
    with pytest.raises(RankError, match=r"bad\.jsonl"):
        pool.run(1, in_turns, folders, cache)
    assert ours[1].exits[0]["code"] == 65 and "bad.jsonl" in ours[1].exits[0]["message"] and not ours[0].exits
    assert pool.run(1, in_turns, folders, cache) == [0]
    assert ours[0].exits[0]["code"] == 0 and ours[0].steps == [2]
