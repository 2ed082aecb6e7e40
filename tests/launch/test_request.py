"""What will be started can be read before it is, and ranks get what they need."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from launch import launcher
from launch.environment import LaunchError, hugging_face_cache, isotrain_cache, rank_environment, rank_variables
from launch.launcher import render
from launch.output import Tee
from launch.request import LaunchRequest


def request(world: int, **changes: int) -> LaunchRequest:
    sizes = {"nodes": 1, "ranks_per_node": 4} | changes
    return LaunchRequest(Path("run"), ("python", "-m", "rank"), world, **sizes)


def test_several_ranks_are_started_by_torchrun_on_a_free_port() -> None:
    argv = render(request(4)).argv
    assert argv[1:3] == ("-m", "torch.distributed.run") and "--standalone" in argv
    assert argv[argv.index("--nproc-per-node") + 1] == "4"
    assert argv[-3:] == ("python", "-m", "rank")


def test_one_rank_is_started_plainly() -> None:
    rendered = render(request(1))
    assert rendered.argv == ("python", "-m", "rank")
    assert dict(rendered.environment)["WORLD_SIZE"] == "1"
    assert "WORLD_SIZE=1" in rendered.text and rendered.text.endswith("python -m rank")


@pytest.mark.parametrize(
    ("world", "changes", "message", "hint"),
    [
        (4, {"nodes": 2}, "cluster.nodes=2", "cluster.nodes=1"),
        (5, {}, "needs 5 ranks, but cluster.gpus_per_node=4", "cluster.gpus_per_node=5"),
    ],
)
def test_what_this_machine_cannot_start_is_refused(
    world: int, changes: dict[str, int], message: str, hint: str
) -> None:
    with pytest.raises(LaunchError, match=message) as raised:
        render(request(world, **changes))
    assert raised.value.hint.startswith(hint)


@pytest.mark.parametrize(("ranks", "cores", "threads"), [(4, 2, "1"), (1, 2, "2"), (3, 16, "5")])
def test_cores_are_dealt_out_among_ranks(ranks: int, cores: int, threads: str) -> None:
    assert rank_variables(ranks, cores, {})["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(("device", "ranks", "warned"), [("cpu", 4, True), ("cpu", 1, False), ("cuda", 4, False)])
def test_more_threads_than_the_cores_bear_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, warned: bool
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(launcher, "usable_cores", lambda: 8)
    found = render(replace(request(ranks), device=device)).warning
    assert found.startswith("OMP_NUM_THREADS=4 is 16 threads of 4 ranks on 8 cores") if warned else found == ""


def test_what_the_user_set_in_the_environment_stays() -> None:
    mine = {"OMP_NUM_THREADS": "7", "HF_HUB_OFFLINE": "0"}
    assert not set(mine) & set(rank_variables(4, 8, mine))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_a_broken_rank_environment_is_said(variables: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message) as raised:
        rank_environment(variables)
    assert "torchrun" in raised.value.hint


def test_caches_follow_the_usual_variables() -> None:
    assert isotrain_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/isotrain")
    assert hugging_face_cache({"HF_HUB_CACHE": "/h", "HF_HOME": "/x"}) == Path("/h")
    assert hugging_face_cache({}) == Path("~/.cache/huggingface/hub").expanduser()


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_closed_terminal_does_not_stop_a_rank() -> None:
    log = io.StringIO()
    assert Tee(Gone(), log).write("step 1\n") == 7
    assert log.getvalue() == "step 1\n"


def test_a_message_clears_the_bar_on_a_terminal_and_not_in_the_log() -> None:
    terminal, log = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    tee = Tee(terminal, log)
    print("saved", "step 5", file=tee)
    assert terminal.getvalue() == "\r\x1b[2Ksaved step 5\n" and log.getvalue() == "saved step 5\n"
