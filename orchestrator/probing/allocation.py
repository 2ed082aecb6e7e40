"""What ``slurm/probe.sbatch`` runs on the first node: a step on every node, rounds of links, and what was found."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launch.environment import child_environment, rank_variables, slurm_variables, usable_cores
from launch.parent import dying_with_parent
from launch.slurm.allocation import Allocation, read_allocation
from launch.slurm.commands import host_names, node_address
from launch.slurm.step import StepRequest, srun_command
from orchestrator.config.job import SlurmConfig
from orchestrator.jobs.allocation import rank_program
from orchestrator.probing.clock import telling_time
from orchestrator.probing.linking import Group, Meeting, pairs
from orchestrator.probing.node import ASKED, OVER, answer_key, groups_text, round_key
from orchestrator.probing.report import Asked, Found, Link, Report, asked_file, read_asked, read_report, write_found

if TYPE_CHECKING:
    import torch.distributed as dist

Say = Callable[[str], None]
PAIR_ROUNDS = 3
GRACE_S = 10.0  # beyond the patience, for a node to say that its own has ended
LOOK_EVERY_S = 0.2
LEAVING_S = 5.0


@dataclass(frozen=True)
class Tasks:
    """The steps of a probe: by node the srun that started its task, and the file of what that says."""

    steps: Mapping[str, subprocess.Popen[bytes]]
    logs: Mapping[str, Path]

    def last_words(self, node: str) -> str:
        """The last line that a node's task, or its srun, has said; empty where there is none."""
        with suppress(OSError):
            lines = self.logs[node].read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""


def run_probe(run_dir: Path, say: Say) -> Found:
    """Probe the nodes of this allocation; what is found is in the run folder, too.

    A node that is silent, hung or dead costs time, and nothing else: its step is its own, and whoever waits for it has
    a limit.

    Raises:
        LaunchError: this is no job of Slurm's. SlurmError: Slurm does not answer.
    """
    from torch.distributed import TCPStore

    allocation = read_allocation(slurm_variables())
    asked = read_asked(asked_file(run_dir).read_text(encoding="utf-8"))
    nodes = host_names(allocation.node_list)
    host = node_address(nodes[0])
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    store.set(ASKED, asked_file(run_dir).read_text(encoding="utf-8"))
    with telling_time() as clock_port:
        tasks = _start(run_dir, allocation, asked, nodes, (Meeting(host, store.port), clock_port))
        try:
            found = _probed(store, asked, tasks, say)
            write_found(run_dir, found)
        finally:
            _end(tasks)
    return found


def _start(
    run_dir: Path, allocation: Allocation, asked: Asked, nodes: Sequence[str], place: tuple[Meeting, int]
) -> Tasks:
    meeting, clock_port = place
    cores = min(usable_cores(), allocation.cpus_per_node)
    environment = child_environment(rank_variables(max(1, asked.gpus_per_node), cores))
    slurm = SlurmConfig(prologue=list(asked.prologue))
    steps, logs = {}, {}
    for node in nodes:
        words = ("probe-node", str(run_dir), node, meeting.host, str(meeting.port), str(clock_port))
        program = rank_program(run_dir, slurm, asked.device, words)
        argv = srun_command(StepRequest(allocation, (node,), 1, program, {}, run_dir))
        logs[node] = run_dir / "slurm" / f"probe-{node}.out"
        with logs[node].open("wb") as log:
            steps[node] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=dying_with_parent(signal.SIGTERM),
                start_new_session=True,
            )
    return Tasks(steps, logs)


class _Rounds:
    """A probe as it goes: what living nodes have reported, and why the others are silent."""

    def __init__(self, store: dist.Store, asked: Asked, tasks: Tasks) -> None:
        self.reports: dict[str, Report] = {}
        self.silent: dict[str, str] = {}
        self._store, self._asked, self._tasks = store, asked, tasks
        self._number = 0

    def look(self) -> None:
        """What every node sees of itself."""
        self._hear(list(self._tasks.steps), self._asked.patience_s)

    def meet(self, groups: Sequence[Sequence[str]]) -> None:
        """Let groups of living nodes reduce together, all at once; a group of which one is silent is left out."""
        whole = [members for members in groups if not self.silent.keys() & set(members)]
        told = [_group(self._number, place, members, self._asked) for place, members in enumerate(whole)]
        self._store.set(round_key(self._number), groups_text(told))
        self._number += 1
        self._hear(list(self.reports), self._asked.patience_s + GRACE_S)

    def leave(self) -> None:
        """Tell all that it is over."""
        self._store.set(round_key(self._number), OVER)

    def _hear(self, nodes: Sequence[str], patience_s: float) -> None:
        self.reports = _collect(self._store, self._number, nodes, self._tasks, patience_s)
        for node in nodes:
            if node not in self.reports:
                self.silent[node] = _why_silent(node, self._tasks, patience_s)


def _probed(store: dist.Store, asked: Asked, tasks: Tasks, say: Say) -> Found:
    rounds = _Rounds(store, asked, tasks)
    rounds.look()
    say(f"{len(rounds.reports)} of {len(tasks.steps)} nodes have looked at themselves")
    for groups in pairs(_ready(rounds.reports, asked), PAIR_ROUNDS):
        rounds.meet(groups)
        say(f"links: {', '.join(' and '.join(pair) for pair in groups)}")
    in_pairs, whole = rounds.reports, None
    linked = [node for node, report in in_pairs.items() if report.rate]
    if len(linked) > 2:  # or a pair has measured it
        rounds.meet([linked])
        whole = _whole(rounds.reports, linked)
        say(f"links: {len(linked)} nodes together")
    rounds.leave()
    answered = tuple(report for node, report in in_pairs.items() if node not in rounds.silent)
    return Found(asked.token, answered, rounds.silent, whole)


def _group(number: int, place: int, nodes: Sequence[str], asked: Asked) -> Group:
    ranks = asked.gpus_per_node if asked.device == "cuda" else 1
    return Group(f"round/{number}/{place}", tuple(nodes), ranks, asked.device, asked.patience_s)


def _ready(reports: Mapping[str, Report], asked: Asked) -> list[str]:
    """Nodes that can take part: on GPUs, those that have as many as all others."""
    return [node for node, one in reports.items() if asked.device == "cpu" or len(one.gpus) >= asked.gpus_per_node]


def _whole(heard: Mapping[str, Report], nodes: Sequence[str]) -> Link:
    """The all-reduce over all: the slowest node's figure, and the first error."""
    links = [heard[node].links[-1] for node in nodes if node in heard]
    error = next((link.error for link in links if link.error), "")
    if len(links) < len(nodes):
        error = error or "a node has fallen silent"
    return Link(tuple(nodes), 0.0 if error else min(link.rate for link in links), error)


def _collect(
    store: dist.Store, number: int, nodes: Sequence[str], tasks: Tasks, patience_s: float
) -> dict[str, Report]:
    """What nodes answer, until all have, or those that have not are dead or out of time."""
    found: dict[str, Report] = {}
    deadline = time.monotonic() + patience_s
    waiting = list(nodes)
    while waiting:
        is_late = time.monotonic() > deadline
        dead = {node for node in waiting if tasks.steps[node].poll() is not None}
        for node in list(waiting):
            if store.check([answer_key(number, node)]):
                found[node] = read_report(store.get(answer_key(number, node)))
                waiting.remove(node)
            elif node in dead:
                waiting.remove(node)
        if is_late:
            break
        time.sleep(LOOK_EVERY_S if waiting else 0.0)
    return {node: found[node] for node in nodes if node in found}


def _why_silent(node: str, tasks: Tasks, patience_s: float) -> str:
    code = tasks.steps[node].poll()
    if code is None:
        return f"no answer in {patience_s:.0f} s"
    said = tasks.last_words(node)
    return f"its task has ended: {said}" if said else f"its task has ended with code {code}"


def _end(tasks: Tasks) -> None:
    """Let tasks leave, and end those that do not; Slurm ends what is left of them with the job."""
    deadline = time.monotonic() + LEAVING_S
    while time.monotonic() < deadline and any(step.poll() is None for step in tasks.steps.values()):
        time.sleep(LOOK_EVERY_S)
    for step in tasks.steps.values():
        if step.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(step.pid, signal.SIGKILL)
