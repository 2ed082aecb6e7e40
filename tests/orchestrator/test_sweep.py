"""Sweeps: Hydra's points, what is pruned, what is run, how they compare, what is gone on with. Runs are stand-ins."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.many import Task, TaskEnd, run_tasks
from orchestrator.cli import main
from orchestrator.config.building import read_job
from orchestrator.config.grid import grid
from orchestrator.config.loading import compose_job, compose_points
from orchestrator.errors import ConfigError, DataError
from orchestrator.sweeps import running
from orchestrator.sweeps.book import LONGEST_NAME, Book, Metric, Point, Row, read_book, write_book
from orchestrator.sweeps.picture import write_picture
from orchestrator.sweeps.planning import PlannedPoint, plan_sweep
from orchestrator.sweeps.running import crowded, gpu_shares, shares
from orchestrator.sweeps.searching import asked_metric, plan_only
from tests.orchestrator.test_cli import ROOT, TINY

Sweeping = Callable[..., tuple[int, dict[str, Any], str]]
# What `isotrain train job.yaml --json` is here: it logs a loss of 100 * lr and leaves a checkpoint, unless its seed
# says otherwise.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
import yaml
run_dir = Path(sys.argv[1]).parent
job = yaml.safe_load((run_dir / "job.yaml").read_text())
seed, steps = job["seed"], job["steps"]
with (run_dir.parent / "order").open("a") as order:
    order.write(f"{run_dir.name}\\n")
if seed == 7:
    print(json.dumps({"code": 65, "error": "row 3 is no JSON\\nreally", "hint": ""}))
    sys.exit(65)
if seed == 6:
    print(json.dumps({"code": 93, "error": "step 2: loss nan", "hint": ""}))
    sys.exit(93)
if seed == 9:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 8 and not (run_dir / "again").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    (run_dir / "again").touch()
    time.sleep(60)
with (run_dir / "metrics.jsonl").open("w") as metrics:
    for step in range(1, steps + 1):
        metrics.write(json.dumps({"step": step, "loss": 100 * job["optimizer"]["lr"], "step_s": 0.5}) + "\\n")
folder = run_dir / "checkpoints" / f"step-{steps:06d}"
folder.mkdir(parents=True)
(folder / "manifest.json").write_text("{}")
(run_dir / "checkpoints" / "latest").write_text(folder.name)
print(json.dumps({"code": 0}))
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are processes, and no training."""

    def task(one: PlannedPoint) -> Task:
        words = (sys.executable, "-c", STAND_IN, str(one.run_dir / "job.yaml"))
        return Task(str(one.point.number), words, one.run_dir / "logs" / "train.log")

    monkeypatch.setattr(running, "_task", task)
    monkeypatch.setattr("orchestrator.runs.is_whole", lambda run_dir, step: True)  # it leaves empty checkpoints


@pytest.fixture
def sweep(stand_in: None, capsys: pytest.CaptureFixture[str]) -> Sweeping:
    """``isotrain sweep WORDS --json``: code, value, and what was said."""

    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = main(["sweep", *TINY, *words, "--json"])
        said = capsys.readouterr()
        value = json.loads(said.out)
        assert value["code"] == code
        return code, value, said.err

    return run


@contextlib.contextmanager
def pressing_ctrl_c(*when: Callable[[], bool]) -> Iterator[None]:
    """Press Ctrl-C in this process each time that the next of these has come true; give up after a minute."""

    def press() -> None:
        deadline = time.monotonic() + 60
        for is_so in when:
            while not is_so():
                if time.monotonic() > deadline:
                    return
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    yield
    thread.join()


def states(value: dict[str, Any]) -> list[str]:
    return [point["state"] for point in value["points"]]


@pytest.mark.parametrize(
    "words",
    [
        ["tuner.r=8,16", "optimizer.lr=1e-4,3e-4", "steps=5"],
        ["seed=range(0,4)", "tuner=lora,full"],
        ["seed=range(4,0,-2)", "optimizer.lr=range(0.1,0.35,0.1)"],
        ["tuner.r=choice(4,8)", "++topology.tp=1,2", "tuner.r=16,32"],
        ["tuner.targets=[q_proj],[q_proj,v_proj]", "data.path='a b','c,d'", "topology.sp=true,null"],
        ["tuner=glob(*,exclude=p*)", "steps=sort(3,1,2)"],
        ["steps=1,2", "steps=3", "seed=1,2"],
    ],
)
def test_points_are_those_of_hydras_own_sweeper(words: list[str]) -> None:
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from orchestrator.config.loading import config_root, parse_words

    with initialize_config_dir(config_dir=str(config_root()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        (theirs,) = BasicSweeper.split_arguments(parser.parse_overrides(words), max_batch_size=None)

    def meant(texts: Any) -> dict[str, Any]:
        return {one.get_key_element(): one.value() for one in parse_words(list(texts))}

    ours = grid(words)
    assert [meant([*ours.common, *swept]) for swept in ours.points] == [meant(one) for one in theirs]


@pytest.mark.parametrize(
    ("common", "points"),
    [
        (
            ["model=smollm2_135m", "run_dir='/r-${seed}'", "optimizer.betas=[0.9,0.95]"],
            [
                ["seed=1", "++tuner.r=4"],
                ["seed=2", "tuner=dora"],
                ["tuner=dora", "tuner.targets=[q_proj]"],
                ["steps=x"],
            ],
        ),
        (["experiment=demo"], [["topology.pp=1", "data=jsonl"], ["cluster=one"], ["experiment=null"], ["stepz=1"]]),
        (["model.config={model_type: llama}"], [["model.config={vocab_size: 7}"], ["model.config=null"]]),
    ],
)
def test_points_composed_together_are_those_composed_alone(common: list[str], points: list[list[str]]) -> None:
    for point, job in zip(points, compose_points(common, points), strict=True):
        if isinstance(job, ConfigError):
            with pytest.raises(ConfigError, match=re.escape(str(job))):
                compose_job([*common, *point])
        else:
            assert job == compose_job([*common, *point])


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["steps=3"], "nothing is swept: no word has several values", "tuner.r=8,16"),
        (["seed=range(3,3)"], "seed=range(3,3) has no values", "as in: tuner.r=8,16"),
        (["nothing=glob(*)"], "nothing=glob(*) has no values", "as in: tuner.r=8,16"),
        (["optimizer.lr=interval(0,1)"], "a grid cannot list the values of an interval", "'optimizer.lr=choice"),
        (
            ["seed=range(0,100)", "steps=range(1,12)"],
            "100 of seed x 11 of steps are 1100 points; at most 1000",
            "fewer",
        ),
        (["seed=1,"], "'seed=1,' is no override", ""),
        (["wandb_api_key=a,b"], "a secret does not belong on a command line", "export"),
    ],
)
def test_words_that_make_no_grid_are_refused(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        grid(words)
    assert message in str(raised.value) and raised.value.hint.startswith(hint)


@given(st.integers(0, 999), st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_folders_of_points_are_plain(number: int, overrides: list[str]) -> None:
    name = Point(number, tuple(overrides)).folder
    assert re.fullmatch(r"\d{3}[A-Za-z0-9_.=+-]*", name) and len(name) <= LONGEST_NAME
    assert name.startswith(f"{number:03d}")


def test_all_points_are_run_and_compared(sweep: Sweeping, tmp_path: Path) -> None:
    folder = tmp_path / "a sweep"
    words = ["optimizer.lr=0.3,0.1", "topology.tp=1,3", "steps=25", f"run_dir='{folder}'"]
    code, value, said = sweep(*words)
    assert code == 0 and states(value) == ["done", "pruned", "done", "pruned"]
    assert "sweep of 4 points" in said and "2 impossible, 2 to run" in said
    assert "topology.tp=3" in value["points"][1]["reason"]
    assert not (folder / value["points"][1]["folder"]).exists()
    best = value["best"]
    assert (best["number"], best["value"], best["step"], best["seconds"]) == (2, pytest.approx(10), 25, 12.5)
    job = read_job(folder / best["folder"])
    assert (job.optimizer.lr, job.topology.tp, job.run_dir) == (0.1, 1, str(folder / best["folder"]))
    assert json.loads((folder / "sweep.json").read_text())["best"] == 2
    picture = ElementTree.parse(value["plot"]).getroot()
    assert len(picture.findall(".//{*}polyline")) == 2 and len(picture.findall(".//{*}rect")) == 2


def test_the_same_command_does_only_what_is_missing(sweep: Sweeping, tmp_path: Path) -> None:
    words = ["seed=0,7,1", "optimizer.lr=0.1", "steps=4", f"run_dir={tmp_path}/s"]
    code, value, said = sweep(*words)
    assert code == 1 and states(value) == ["done", "failed", "done"]
    failed = value["points"][1]
    assert (failed["code"], failed["reason"]) == (65, "row 3 is no JSON") and value["error"] == "point 1 failed"
    assert "point 1 failed, 0 of 4 steps: row 3 is no JSON" in said
    code, value, said = sweep(*words)
    assert code == 1 and "2 finished already, 1 to run" in said
    started = [line[:3] for line in (tmp_path / "s" / "order").read_text().splitlines()]
    assert started == ["000", "001", "002", "001"]
    code, value, _ = sweep(*[word.replace("steps=4", "steps=6") for word in words])  # as train: more steps go on
    assert [point["step"] for point in value["points"]] == [6, 0, 6]


def test_another_sweep_is_refused_with_what_differs(sweep: Sweeping, tmp_path: Path) -> None:
    sweep("seed=0,1", "steps=4", f"run_dir={tmp_path}/s")
    code, value, _ = sweep("seed=0,2", "steps=3", "metrics.progress=false", f"run_dir={tmp_path}/s")
    assert code == 64
    assert value["error"].splitlines()[1:] == [
        "  no longer a point: seed=1",
        "  a new point: seed=2",
        "  steps: 4 -> 3",
    ]
    again = value["hint"].partition("   or   ")[0]
    assert again.startswith("isotrain sweep model.weights=random") and again.endswith(f"steps=4 run_dir={tmp_path}/s")
    code, value, _ = sweep(*(f"seed={seed},2" for seed in [",".join(map(str, range(3, 30)))]), f"run_dir={tmp_path}/s")
    assert "  and 18 more" in value["error"] and len(value["error"].splitlines()) < 20
    assert sweep("seed=1,0", "steps=4", f"run_dir={tmp_path}/s")[0] == 0  # another order is the same sweep


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=0,1", "stepz=3"], "unknown key 'stepz'; the nearest is 'steps'"),
        (["topology.tp=3,5"], "topology.tp=3"),
        (["seed=0,1", "run_dir='r-${seed}'"], "run_dir differs from point to point"),
        (["seed=0,1", "run_dir=/etc/passwd"], "run_dir=/etc/passwd is a file"),
        (["seed=0,1", "run_dir=/etc"], "run_dir=/etc is not empty and holds no sweep (no sweep.json)"),
        (["seed=0,1", "run_dir=/proc/nope"], "run_dir=/proc/nope cannot be made"),
        (["seed=0,1", "--best", "loss:low"], "--best loss:low: a column of metrics.jsonl"),
        (["seed=0,1", "--jobs", "0"], "0 should be at least 1"),
    ],
)
def test_what_cannot_be_swept_is_64_before_anything_starts(
    sweep: Sweeping, words: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, value, _ = sweep(*words)
    assert code == 64 and message in value["error"] and value["hint"]
    assert not list(tmp_path.iterdir())


def test_a_sweep_inside_of_torchrun_is_refused(sweep: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, value, _ = sweep("seed=0,1")
    assert code == 64 and "sweep starts its own ranks" in value["error"]


def test_a_dry_run_shows_every_point_and_writes_nothing(sweep: Sweeping, tmp_path: Path) -> None:
    words = ["seed=0,1", "topology.tp=1,3", f"run_dir={tmp_path}/s"]
    code, value, _ = sweep(*words, "data.path=/not/here.jsonl", "--dry-run")  # as that of train: files may be elsewhere
    assert code == 0 and states(value) == ["waiting", "pruned", "waiting", "pruned"]
    assert "/not/here.jsonl" in sweep(*words, "data.path=/not/here.jsonl")[1]["error"]
    code, value, _ = sweep("data.path=/not/here.jsonl,builtin:lighthouse", f"run_dir={tmp_path}/s", "--dry-run")
    assert code == 0 and states(value) == ["waiting", "waiting"]
    assert not list(tmp_path.iterdir())


def test_a_killed_point_does_not_end_the_others(sweep: Sweeping, tmp_path: Path) -> None:
    code, value, _ = sweep("seed=9,0,1,2", "--jobs", "3", f"run_dir={tmp_path}/s", "steps=1")
    assert code == 1 and states(value) == ["failed", "done", "done", "done"]
    assert (value["points"][0]["code"], value["points"][0]["reason"]) == (137, "killed by SIGKILL")


def test_of_points_that_gave_up_no_second_try_is_advised(sweep: Sweeping, tmp_path: Path) -> None:
    code, _, err = sweep("seed=0,6", f"run_dir={tmp_path}/s", "steps=1")
    assert code == 1 and f"hint: isotrain resume {tmp_path}/s/001-seed=6 KEY=VALUE" in err
    code, _, err = sweep("seed=6,9", f"run_dir={tmp_path}/t", "steps=1")
    assert code == 1 and f"hint: isotrain sweep {tmp_path}/t   (does what is missing)" in err


def test_ctrl_c_lets_points_save_and_the_same_command_goes_on(sweep: Sweeping, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    words = ["seed=0,8,1", "steps=2", f"run_dir={folder}"]

    with pressing_ctrl_c(lambda: bool(list(folder.glob("001-*/again")))):
        code, value, said = sweep(*words)
    assert code == 85 and states(value) == ["done", "interrupted", "waiting"]
    assert "stopping 1 of them" in said and f"hint: isotrain sweep {folder}" in said
    assert main(["sweep", str(folder), "--dry-run"]) == 0
    code, value, _ = sweep(*words)
    assert code == 0 and states(value) == ["done"] * 3


def test_a_second_ctrl_c_is_passed_on(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    script = f"""
import signal, sys, time
def note(*_):
    with open({str(heard)!r}, "a") as file: file.write("x")
    if len(open({str(heard)!r}).read()) == 2: sys.exit(130)
signal.signal(signal.SIGTERM, note)
open({str(heard)!r}, "w").close()
while True: time.sleep(0.05)
"""

    ends: list[TaskEnd] = []
    task = Task("one", (sys.executable, "-S", "-c", script), tmp_path / "log")
    with pressing_ctrl_c(heard.exists, lambda: heard.read_text() == "x"):
        stops = run_tasks([task, task], [{}], lambda _: None, lambda _, end: ends.append(end), lambda text: None)
    assert stops == 2 and [end.code for end in ends] == [130]


def test_places_get_their_variables_and_what_is_said_is_kept(tmp_path: Path) -> None:
    show = (sys.executable, "-S", "-c", "import os, sys; print(os.environ['PLACE']); print('x', file=sys.stderr)")
    ends: dict[str, TaskEnd] = {}
    tasks = [Task(str(number), show, tmp_path / "logs" / f"{number}") for number in range(3)]
    places = [{"PLACE": "a"}, {"PLACE": "b"}]
    assert run_tasks(tasks, places, lambda _: None, lambda task, end: ends.update({task.name: end}), print) == 0
    assert {end.code for end in ends.values()} == {0} and ends["0"].said == "a\n" and ends["1"].said == "b\n"
    assert [(tmp_path / "logs" / f"{number}").read_text() for number in range(3)] == ["x\n"] * 3


def test_runs_at_once_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(running, "usable_cores", lambda: 8)
    words = [*TINY, "seed=0,1", f"run_dir={tmp_path}/s"]
    waiting = plan_sweep(words, grid(words), plan_only).waiting
    assert shares(waiting, 2) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert shares(waiting, 1) == [{}]
    assert crowded(waiting, 2) == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert crowded(waiting, 1) == "" and shares(waiting, 2) == [{}] * 2
    assert crowded(waiting, 2).startswith("OMP_NUM_THREADS=8 is 16 threads of 2 ranks on 8 cores, and every step")


def test_too_few_gpus_for_so_many_runs_are_said() -> None:
    with pytest.raises(
        ConfigError, match=r"--jobs 3 with cluster\.gpus_per_node=2 takes 6 GPUs, but there are 4"
    ) as raised:
        gpu_shares(["0", "1", "2", "3"], per_run=2, jobs=3)
    assert raised.value.hint == "--jobs 2"


def test_the_best_is_the_smallest_or_the_largest_finished_one(tmp_path: Path) -> None:
    def row(number: int, value: float | None, state: Any = "done") -> Row:
        return Row(Point(number, (f"seed={number}",)), state, value=value)

    rows = (row(0, 3.0), row(1, 1.0), row(2, 0.5, "failed"), row(3, None))
    smallest, largest = (Book((), Metric("loss", largest), rows).best for largest in (False, True))
    assert smallest is rows[1] and largest is rows[0]
    assert Book((), Metric(), rows[2:]).best is None
    assert asked_metric("grad_norm:min") == Metric("grad_norm")
    book = Book(("seed=0,1",), Metric(), rows)
    write_book(tmp_path, book)
    assert read_book(tmp_path) == book
    assert write_picture(tmp_path, book) is None  # nothing was logged


def test_a_metric_that_nobody_has_is_said(sweep: Sweeping, tmp_path: Path) -> None:
    code, value, said = sweep("seed=0,1", "steps=1", f"run_dir={tmp_path}/s", "--best", "los")
    assert code == 0 and value["best"] is None and "no finished point has a number for los" in said
    assert sweep("seed=0,1", "steps=1", f"run_dir={tmp_path}/s", "--best", "step_s:max")[1]["best"]["number"] == 0


def test_a_broken_book_is_said(sweep: Sweeping, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"words": []}')
    with pytest.raises(DataError, match=r"sweep\.json cannot be read"):
        read_book(tmp_path)
    assert sweep("seed=0,1", f"run_dir={tmp_path}")[0] == 65


def test_hydras_own_sweeper_trains_what_the_grid_does(sweep: Sweeping, tmp_path: Path) -> None:
    words = ["seed=0,1", "optimizer.lr=0.3,0.1", "steps=2", f"run_dir='{tmp_path}/a sweep'"]
    code, value, said = sweep("hydra/sweeper=basic", "hydra.sweeper.max_batch_size=3", *words, "--jobs", "2")
    assert code == 0 and states(value) == ["done"] * 4
    assert "batch of 3 points: 3 to run" in said and "batch of 1 points: 1 to run" in said
    assert (tmp_path / "a sweep" / "hydra" / "multirun.yaml").is_file()
    again = sweep(*words)[1]  # the same points in the same folders
    assert [one | {"reason": ""} for one in again["points"]] == [one | {"code": None} for one in value["points"]]
    assert len((tmp_path / "a sweep" / "order").read_text().splitlines()) == 4


def test_multirun_is_a_sweep_and_takes_the_settings_of_hydras_launchers(
    stand_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["seed=0,7", "topology.tp=1,3", "steps=1", f"run_dir={tmp_path}/s", "hydra.launcher.best=step_s:max"]
    assert main(["train", "--multirun", *TINY, *words, "--json"]) == 1
    said = capsys.readouterr()
    value = json.loads(said.out)
    assert states(value) == ["done", "pruned", "failed", "pruned"] and value["best"]["value"] == 0.5
    assert f"next: isotrain export {tmp_path}/s/000-seed=0+topology.tp=1 --to peft adapter" in said.err
    assert "the sweeper stops: point 2 (seed=7 topology.tp=1) failed: row 3 is no JSON" in said.err
    assert main(["train", "-m", *TINY, "seed=0,1", "steps=1", f"run_dir={tmp_path}/t", "--json"]) == 0


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["hydra/sweeper=ax"], "Could not find 'hydra/sweeper/ax'", "pip install hydra-ax-sweeper"),
        (["hydra/sweeper=nope"], "Could not find 'hydra/sweeper/nope'", "hydra/sweeper=basic"),
        (["hydra.sweeper.n_trials=3"], "Could not override 'hydra.sweeper.n_trials'", "see docs/sweeps.md"),
        (["hydra/sweeper=basic", "--dry-run"], "Hydra's sweepers choose points as they go", "leave it out"),
        (["hydra/sweeper=basic", "seed=range(3,3)"], "the sweeper has asked for no point", "tuner.r=8,16"),
        (["hydra/sweeper=basic", "stepz=1"], "unknown key 'stepz'", "steps=1"),
        (
            ["hydra/sweeper=basic", "topology.tp=3"],
            "none of 2 points can work; the first: model has 2 attention heads",
            "isotrain plan",
        ),
    ],
)
def test_what_hydra_cannot_sweep_is_64(
    sweep: Sweeping, words: list[str], message: str, hint: str, tmp_path: Path
) -> None:
    code, value, _ = sweep("seed=0,1", f"run_dir={tmp_path}/s", *words)
    assert code == 64 and message in value["error"] and value["hint"].startswith(hint)


def test_a_stopped_search_keeps_what_is_done_and_a_point_that_failed_ends_it(sweep: Sweeping, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    words = ["hydra/sweeper=basic", "hydra.sweeper.max_batch_size=1", "seed=0,8,1", "steps=2", f"run_dir={folder}"]

    with pressing_ctrl_c(lambda: bool(list(folder.glob("001-*/again")))):
        code, value, said = sweep(*words)
    assert code == 85 and states(value) == ["done", "interrupted"] and "stopped; what is done is kept" in said
    code, value, _ = sweep(str(folder))
    assert code == 0 and states(value) == ["done"] * 3


def test_the_table_has_the_best_on_top(stand_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *TINY, "optimizer.lr=0.3,0.1", "topology.tp=1,3", "steps=1", f"run_dir={tmp_path}/s"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == [
        "point",
        "optimizer.lr",
        "topology.tp",
        "state",
        "code",
        "step",
        "loss",
        "seconds",
        "why",
    ]
    assert [line.split()[0] for line in lines[1:3]] == [
        "2",
        "0",
    ] and "best loss: 10.0000, point 2: optimizer.lr=0.1" in said.err


def test_a_sweep_whose_parent_is_killed_leaves_no_run_behind(tmp_path: Path) -> None:
    """The kernel tells the runs, which save as at any SIGTERM."""
    beat, script = tmp_path / "beat", tmp_path / "parent.py"
    script.write_text(f"""
import sys
from pathlib import Path
from launch.many import Task, run_tasks
child = "import time\\nwhile True:\\n    open({str(beat)!r}, 'w').close()\\n    time.sleep(0.02)"
task = Task("one", (sys.executable, "-S", "-c", child), Path({str(tmp_path / "log")!r}))
run_tasks([task], [{{}}], lambda _: None, lambda *_: None, print)
""")
    parent = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not beat.exists():
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while True:
        beat.unlink(missing_ok=True)
        time.sleep(0.2)
        if not beat.exists():
            return
        assert time.monotonic() < deadline, "it runs on"
