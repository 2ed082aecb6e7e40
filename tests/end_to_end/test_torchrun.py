"""``torchrun`` by hand: nodes come and go, its agent is killed or asked to stop; the run is the same."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.states import rank_pids
from orchestrator.supervise import last_logged_step
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, Shell, close, is_alive, wait_for

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1")
OWN_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
PAIR = ["--standalone", "--nproc-per-node", "2"]
MANY = 100_000

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def torchrun(shell: Shell, tmp_path: Path) -> Iterator[Start]:
    """Starts an agent with these options, and its ranks with these words; what still runs at the end is killed."""
    agents: list[subprocess.Popen[bytes]] = []

    def begin(options: list[str], words: list[str], **variables: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"agent-{len(agents)}.log").open("wb") as log:
            argv = [*TORCHRUN, *options, "-m", "orchestrator", "train", *words]
            environment = shell.environment | variables
            agent = subprocess.Popen(argv, cwd=shell.folder, env=environment, stdout=log, stderr=log)
        agents.append(agent)
        return agent

    yield begin
    for agent in agents:
        if agent.poll() is None:
            agent.kill()  # its ranks then end by themselves
        agent.wait()


def step_of(run: Folder) -> int:
    return last_logged_step(run.path / "metrics.jsonl") or 0


def world_of(run: Folder) -> int:
    """Ranks of the start that trains now."""
    return int(json.loads((run.path / "plan.json").read_text())["ranks_used"])


def said(folder: Path) -> str:
    return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in folder.glob("agent-*.log"))


@pytest.mark.faults
def test_nodes_come_and_go_and_the_run_is_the_same(
    shell: Shell, torchrun: Start, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    """Three nodes; one loses power, two go on; it is back, three go on; all are asked to stop.

    Two ranks do not divide the three rows of a batch.
    """
    keys = {"batch__global_sequences": 3, "checkpoint__every_steps": 20, "optimizer__schedule": "constant"}
    run, alone = Folder(tmp_path / "run"), Folder(tmp_path / "alone")
    more = {"cluster__nodes": "2-3", "topology__tp": 1, "topology__pp": 1, "steps": MANY}
    words = tiny_run_model.words(**keys, **more, run_dir=run.path)
    host, guest = elastic(nodes="2:3", restarts=3)
    nodes = [torchrun(options, words, **OWN_STORES) for options in (host, guest, guest)]

    def trains_on(ranks: int, after: int) -> None:
        def is_so() -> bool:
            return world_of(run) == ranks and step_of(run) > after

        wait_for(lambda: is_so() or nodes[0].poll() is not None)
        assert is_so(), said(tmp_path)

    wait_for(lambda: (run.path / "plan.json").exists())
    trains_on(3, after=25)
    lose_power(nodes[1], run)
    trains_on(2, after=step_of(run))
    nodes[1] = torchrun(guest, words, **OWN_STORES)
    trains_on(3, after=step_of(run))
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    for node in nodes:
        node.wait(60)
    last = max(run.losses)
    assert run.steps[-1] == last, said(tmp_path)
    shell.isotrain("train", *tiny_run_model.words(**keys, steps=last, run_dir=alone.path))
    assert sorted(run.losses) == list(range(1, last + 1)) and close(alone.losses, run.losses)


@pytest.mark.faults
def test_a_node_that_the_batch_cannot_use_stands_by_and_takes_the_place_of_one_that_is_lost(
    torchrun: Start, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    keys = {"batch__global_sequences": 2, "checkpoint__every_steps": 20, "optimizer__schedule": "constant"}
    more = {"cluster__nodes": "1-3", "topology__tp": 1, "topology__pp": 1, "steps": MANY}
    words = tiny_run_model.words(**keys, **more, run_dir=run.path)
    host, guest = elastic(nodes="2:3", restarts=3)
    nodes = [torchrun(options, words, **OWN_STORES) for options in (host, guest, guest)]
    wait_for(lambda: step_of(run) > 25 or nodes[0].poll() is not None)
    assert world_of(run) == 2 and len(run.pids()) == 3, said(tmp_path)
    pids = rank_pids(run.path)
    assert all(agent.poll() is None for agent in nodes)
    lost = next(agent for agent in nodes if parent(pids[1]) == agent.pid)
    if lost is nodes[0]:  # all meet there
        lost = next(agent for agent in nodes if parent(pids[0]) == agent.pid)
    before = step_of(run)
    lose_power(lost, run)
    wait_for(lambda: step_of(run) > before or nodes[0].poll() is not None)
    assert world_of(run) == 2 and step_of(run) > before, said(tmp_path)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    for node in nodes:
        node.wait(60)
    assert run.steps[-1] == max(run.losses)


def test_ranks_save_and_end_when_their_agent_is_killed(
    torchrun: Start, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    agent = torchrun(PAIR, tiny_run_model.words(topology__dp=2, steps=MANY, run_dir=run.path))
    wait_for(lambda: step_of(run) > 5 or agent.poll() is not None)
    ranks = run.pids()
    assert len(ranks) == 2, said(tmp_path)
    agent.kill()
    wait_for(lambda: not any(map(is_alive, ranks)), timeout_s=60)
    assert [one["code"] for one in run.exits.values()] == [85, 85] and run.steps[-1] == max(run.losses)


@pytest.mark.faults
def test_a_rank_that_hangs_by_hand_is_named_and_ends_the_launch(
    torchrun: Start, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    words = tiny_run_model.words(topology__dp=2, steps=MANY, recovery__silent_s=4, run_dir=run.path)
    agent = torchrun(PAIR, words)
    wait_for(lambda: step_of(run) > 5 or agent.poll() is not None)
    os.kill(run.pids()[1], signal.SIGSTOP)
    assert agent.wait(120) == 1  # torchrun waits 30 s for the one that is stopped
    word = run.exits[0]
    assert (word["code"], word["cause"]) == (86, "Silent")
    waits = r"rank 0 waits in \w+ of [\w ]+ \(ranks 0, 1\) at \S+:\d+ in \w+"
    assert re.fullmatch(rf"rank 1 gives no sign of life for \d+ s: .*; {waits}", word["message"])


def test_restarts_from_which_gloo_does_not_come_back_are_refused(
    torchrun: Start, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    agent = torchrun(["--standalone", "--max-restarts", "1"], tiny_run_model.words(run_dir=tmp_path / "run"))
    assert agent.wait(90) == 1
    assert "torchrun --max-restarts 1 lets ranks" in said(tmp_path) and not (tmp_path / "run").exists()
    assert "hint: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --max-restarts 1" in said(tmp_path)


def elastic(nodes: str, restarts: int) -> tuple[list[str], list[str]]:
    """Options of torchrun for the node where all meet, and for one that may come and go; impatient ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    patience = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=6"
    meet = ["--rdzv-backend", "c10d", "--rdzv-id", "tide", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    size = ["--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", str(restarts)]
    host, guest = ([*size, *meet, "--rdzv-conf", f"{patience},is_host={number}"] for number in (1, 0))
    return host, guest


def lose_power(agent: subprocess.Popen[bytes], run: Folder) -> None:
    """Kill an agent and its ranks at once, as if their machine were gone."""
    ranks = [pid for pid in rank_pids(run.path).values() if parent(pid) == agent.pid]
    assert len(ranks) == 1
    for pid in (agent.pid, *ranks):
        os.kill(pid, signal.SIGKILL)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
