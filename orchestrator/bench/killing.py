"""A save is killed at every phase, in real processes; what a run finds afterwards. Made for docs/checkpoints.md.

Two processes save step 3 over steps 1 and 2, of which one stays. One of them gets SIGKILL at a moment, the other
notices and ends. Then the folder is opened as a run opens it, every file hashed, and saved into again.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLD = 2
KEPT = 2
PEER_LIMIT_S = 20


@dataclass(frozen=True)
class Moment:
    """When a process is killed: before or after the ``nth`` call of ``target`` on ``rank``.

    ``step``: the step that is saved then; 2 is there already and is replaced. ``leaves``: the step that must load then.
    """

    words: str
    rank: int
    target: str
    after: bool
    nth: int = 1
    step: int = 3
    leaves: int = 2


SAVE, PUBLISH = "orchestrator.checkpoint.save", "orchestrator.checkpoint.publish"
FILE = "orchestrator.checkpoint.writing:FileWriter"
MOMENTS = (
    Moment("ranks have agreed, nothing is written", 0, f"{SAVE}:prepare", False),
    Moment("the unfinished folder is made", 0, f"{SAVE}:prepare", True),
    Moment("a tensor file has its header only", 1, f"{FILE}.write", False),
    Moment("a tensor file is half written", 1, f"{FILE}.write", True),
    Moment("tensors are on their way between ranks", 1, "orchestrator.checkpoint.exchange:_run_round", True, 2),
    Moment("a tensor file is written, not durable", 1, f"{FILE}.close", False),
    Moment("a tensor file is durable, others are not", 1, f"{FILE}.close", True),
    Moment("a rank reads back what it has written", 1, "orchestrator.checkpoint.writing:hash_from_disk", False),
    Moment("all tensor files are durable", 1, "orchestrator.checkpoint.writing:RankFiles.finish", True),
    Moment("the adapter's configuration is written", 0, f"{PUBLISH}:write_durably", True, 1),
    Moment("state.json is written, the manifest is not", 0, f"{PUBLISH}:write_durably", True, 2),
    Moment("the manifest is written", 0, f"{PUBLISH}:write_durably", True, 3),
    Moment("everything is durable, under its temporary name", 0, f"{PUBLISH}:sync_tree", True),
    Moment("the old checkpoint of this step is moved aside", 0, "pathlib:Path.rename", True, 1, step=2),
    Moment("the new one has its name, latest names the old one", 0, f"{PUBLISH}:write_latest", False),
    Moment("the new latest lies beside the old latest", 0, "orchestrator.checkpoint.folder:write_durably", True),
    Moment("latest names the new one", 0, f"{PUBLISH}:write_latest", True, leaves=3),
    Moment("an old checkpoint is about to be deleted", 0, "orchestrator.checkpoint.retention:remove", False, leaves=3),
    Moment("an old checkpoint is deleted", 0, "orchestrator.checkpoint.retention:remove", True, leaves=3),
)


@dataclass(frozen=True)
class Outcome:
    """What was found after a kill.

    ``killed``: whether the process died of it; ``latest_step``: of the checkpoint that a run goes on from, all of its
    files hashed; ``expected_step``: what it should be; ``left``: what else lay in the folder; ``saves_again``: whether
    the next save works and clears it.
    """

    words: str
    rank: int
    asynchronous: bool
    killed: bool
    latest_step: int | None
    expected_step: int
    left: int
    saves_again: bool

    @property
    def good(self) -> bool:
        """Whether the right checkpoint was there, and the run could go on."""
        return self.killed and self.latest_step == self.expected_step and self.saves_again


def kill_everywhere(asynchronous: bool) -> list[Outcome]:
    """Every moment, each in a new folder."""
    outcomes = []
    for moment in MOMENTS:
        with tempfile.TemporaryDirectory(prefix="killing-") as place:
            outcomes.append(kill_once(Path(place), moment, asynchronous))
    return outcomes


def kill_once(place: Path, moment: Moment, asynchronous: bool) -> Outcome:
    """Save steps 1 and 2, then be killed; open what is left and save again."""
    from orchestrator.checkpoint.load import find_latest_good
    from orchestrator.errors import DataError

    folder = place / "checkpoints"
    codes = _in_processes(place / "first", lambda rank: _save(folder, (1, 2), False))
    if codes != [0] * WORLD:
        raise RuntimeError(f"the saves before the kill ended with {codes}")

    def doomed(rank: int) -> None:
        if rank == moment.rank:
            _kill_at(moment)
        _save(folder, (moment.step,), asynchronous, value=0.5)

    codes = _in_processes(place / "second", doomed)
    killed = codes[moment.rank] == -signal.SIGKILL and codes[1 - moment.rank] != -signal.SIGKILL
    try:
        reader, _ = find_latest_good(folder)
    except DataError:
        reader = None
    left = sum(not path.name.startswith("step-") or "." in path.name for path in folder.iterdir()) - 1
    again = _in_processes(place / "third", lambda rank: _save(folder, (4,), False))
    names = sorted(path.name for path in folder.iterdir())
    whole = find_latest_good(folder)[0]
    clean = all(name == "latest" or "." not in name for name in names)
    saves_again = again == [0] * WORLD and whole is not None and whole.step == 4 and clean
    step = reader.step if reader is not None else None
    return Outcome(moment.words, moment.rank, asynchronous, killed, step, moment.leaves, left, saves_again)


def _in_processes(store: Path, work: Callable[[int], None]) -> list[int]:
    """Fork a process per rank, each with its place in a gloo group; their exit codes (negative: a signal)."""
    children = [_forked(store, rank, work) for rank in range(WORLD)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _forked(store: Path, rank: int, work: Callable[[int], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        from datetime import timedelta

        import torch.distributed as dist

        limit = timedelta(seconds=PEER_LIMIT_S)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=limit)
        work(rank)
        code = 0
    except RuntimeError:
        code = 86  # the other one is gone
    finally:
        os._exit(code)


def _save(folder: Path, steps: Sequence[int], asynchronous: bool, value: float = 0.0) -> None:
    import torch
    import torch.distributed as dist

    from orchestrator.checkpoint.publish import Contents
    from orchestrator.checkpoint.retention import Retention
    from orchestrator.checkpoint.save import SavePolicy
    from orchestrator.checkpoint.saver import Saver
    from parallel.shards import Box, Shard

    box = Box((dist.get_rank() * 8, 0), (8, 64))
    policy = SavePolicy(Retention(last=KEPT), buffer_bytes=4096)
    with Saver(folder, policy, dist.new_group(backend="gloo"), asynchronous=asynchronous) as saver:
        for step in steps:
            data = torch.full(box.size, step + value)
            shards = [
                Shard(f"{module}_proj.lora_A.weight", kind, (16, 64), box, data)
                for module in "qkvo"
                for kind in ("weight", "exp_avg", "exp_avg_sq")
            ]
            saver.save(step, shards, Contents("adapter", {"step": step}, {"adapter_config.json": b"{}"}))


def _kill_at(moment: Moment) -> None:
    """Let this process be killed at a moment."""
    owner, _, name = moment.target.replace(":", ".").rpartition(".")
    holder: Any = pkgutil.resolve_name(owner)
    real, calls = getattr(holder, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment.nth and not moment.after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = real(*args, **options)
        if calls == moment.nth and moment.after:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(holder, name, counted)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a markdown table: a line per moment, a column per kind of save."""
    lines = [
        "| killed with SIGKILL when | rank | a save that training waits for | beside training |",
        "| --- | --- | --- | --- |",
    ]
    kinds: dict[tuple[str, int], dict[bool, Outcome]] = {}
    for one in outcomes:
        kinds.setdefault((one.words, one.rank), {})[one.asynchronous] = one
    for (words, rank), found in kinds.items():
        cells = [_cell(found[asynchronous]) if asynchronous in found else "" for asynchronous in (False, True)]
        lines.append(f"| {words} | {rank} | {cells[0]} | {cells[1]} |")
    good = sum(one.good for one in outcomes)
    lines += ["", f"{good} of {len(outcomes)} leave a checkpoint that loads, and the next save works."]
    return "\n".join(lines)


def _cell(outcome: Outcome) -> str:
    if not outcome.good:
        return f"**fails** ({outcome})"
    return f"step {outcome.latest_step} loads, the next save works"
