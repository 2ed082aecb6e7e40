"""What a user at a shell does and sees: commands as real processes, run folders read back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ISOTRAIN = (sys.executable, "-m", "orchestrator")


@dataclass(frozen=True)
class Shell:
    """A place to type commands in: ``folder`` is where they run, ``cache`` is isotrain's."""

    folder: Path
    cache: Path

    @property
    def environment(self) -> dict[str, str]:
        """One thread a process, its own cache, no keys of anyone."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        mine = {"OMP_NUM_THREADS": "1", "ISOTRAIN_CACHE": str(self.cache), "PYTHONPATH": str(ROOT)}
        return inherited | mine | {"HF_HUB_OFFLINE": "1", "HOME": str(self.folder), "COLUMNS": "120"}

    def run(self, argv: Sequence[str], code: int = 0, timeout_s: float = 150) -> Done:
        """Run a command to its end and check its exit code."""
        ended = subprocess.run(
            argv, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert ended.returncode == code, f"code {ended.returncode}, not {code}:\n{ended.stdout}\n{ended.stderr}"
        return Done(ended.returncode, ended.stdout, ended.stderr)

    def isotrain(self, *words: str, code: int = 0) -> Done:
        """``isotrain WORDS``."""
        return self.run([*ISOTRAIN, *words], code)

    def torchrun(self, ranks: int, *words: str, code: int = 0) -> Done:
        """``torchrun --nproc-per-node RANKS -m orchestrator WORDS``."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        return self.run([*torchrun, "--nproc-per-node", str(ranks), "-m", "orchestrator", *words], code)

    def torchrun_nodes(self, nodes: int, ranks_per_node: int, *words: str, code: int = 0) -> list[Done]:
        """One torchrun per node, all on this machine; their ends in the order of the nodes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        meet = ["--nnodes", str(nodes), "--nproc-per-node", str(ranks_per_node), "--master-port", port]

        def node(number: int) -> Done:
            torchrun = [sys.executable, "-m", "torch.distributed.run", *meet, "--node-rank", str(number)]
            return self.run([*torchrun, "--master-addr", "127.0.0.1", "-m", "orchestrator", *words], code)

        with ThreadPoolExecutor(nodes) as started:
            return list(started.map(node, range(nodes)))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """``isotrain WORDS`` in a process group of its own, as an interactive shell starts it."""
        return subprocess.Popen(
            [*ISOTRAIN, *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which holds one JSON object and nothing else."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"more than one line on standard output:\n{self.out}"
        value = json.loads(lines[0])
        assert isinstance(value, dict) and value["code"] == self.code
        return value

    @property
    def hint(self) -> str:
        """What the last hint says to do."""
        return next(line for line in reversed(self.err.splitlines()) if line.startswith("hint: "))[len("hint: ") :]


class Folder:
    """A run folder, as scripts read it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics(self) -> dict[int, dict[str, Any]]:
        """The lines of metrics.jsonl by step; no step is there twice, and none is missing."""
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        assert steps == list(range(1, len(lines) + 1)), f"steps {steps}"
        return {line["step"]: line for line in lines}

    @property
    def losses(self) -> dict[int, float]:
        """The loss of every step."""
        return {step: line["loss"] for step, line in self.metrics.items()}

    @property
    def exits(self) -> dict[int, dict[str, Any]]:
        """What each rank said of its end."""
        files = (self.path / "exits").glob("rank-*.json")
        return {value["rank"]: value for value in (json.loads(file.read_text()) for file in files)}

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints."""
        return sorted(int(folder.name[5:]) for folder in (self.path / "checkpoints").glob("step-??????"))

    @property
    def latest(self) -> str:
        """The checkpoint that ``latest`` names."""
        return (self.path / "checkpoints" / "latest").read_text().strip()

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.path / "checkpoints" / f"step-{step:06d}"

    def pids(self) -> list[int]:
        """The processes of the living ranks."""
        files = sorted((self.path / "states").glob("rank-*.json"))
        return [json.loads(file.read_text())["pid"] for file in files]

    def copied(self, to: Path, rewound_to: int | None = None) -> Folder:
        """A copy of this folder; ``rewound_to``: as it was when that step had just been saved."""
        shutil.copytree(self.path, to)
        copy = Folder(to)
        if rewound_to is not None:
            for step in copy.steps:
                if step > rewound_to:
                    shutil.rmtree(copy.checkpoint(step))
            (to / "checkpoints" / "latest").write_text(f"step-{rewound_to:06d}\n")
        return copy


def close(first: dict[int, float], second: dict[int, float], relative: float = 1e-5) -> bool:
    """Whether two runs have the same losses in the steps that ``second`` has."""
    assert second
    return all(value == pytest.approx(first[step], rel=relative) for step, value in second.items())


def tensors(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(file)


def distance(first: Path, second: Path) -> float:
    """How far two safetensors files are apart: the largest difference of two elements, relative to the largest value
    of its tensor in ``second``; the worst tensor counts."""
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max() / (two[name].abs().max() + 1e-12)) for name in one)


def wait_for(condition: Callable[[], bool], timeout_s: float = 90) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    """What a terminal does: SIGINT to the foreground process group."""
    os.killpg(process.pid, signal.SIGINT)


def is_one_screen(text: str) -> bool:
    """Whether an error is short and shows no traceback."""
    return 0 < len(text.splitlines()) < 25 and "Traceback" not in text
