"""A Slurm that says what it is told to, at the boundary of processes: for its refusals and for its silences.

``replies`` holds what the next calls of sbatch do, a line each: ``ok``, ``refuse MESSAGE``, ``lose MESSAGE`` (takes the
job, and fails all the same), ``late MESSAGE`` (so, but nobody sees the job before the next call) or ``drop MESSAGE``
(fails, and takes nothing). ``silent`` makes all other commands fail. ``accounts`` says what sacct knows. A probe that
is submitted ends at once with what ``probe_finds`` was told, if it was.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

SACCT_FIELDS = {"JobID", "State", "ExitCode", "DerivedExitCode", "NodeList", "Reason"}
TIMED_OUT = "Batch job submission failed: Socket timed out on send/recv operation"


class FakeSlurm:
    """The folder of the fake commands, seen from a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "sacct"):
            command = folder / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} {folder} {name} "$@"\n')
            command.chmod(command.stat().st_mode | stat.S_IXUSR)

    def replies(self, *lines: str) -> None:
        """What sbatch answers next; after that ``ok``."""
        (self.folder / "replies").write_text("\n".join(lines) + "\n")

    def silent(self, is_silent: bool = True) -> None:
        """Whether nothing answers but sbatch."""
        (self.folder / "silent").unlink(missing_ok=True)
        if is_silent:
            (self.folder / "silent").touch()

    def set_state(self, state: str) -> None:
        """What scontrol says of every job; empty: it knows none."""
        (self.folder / "state").write_text(state)

    def accounts(self, *rows: dict[str, str]) -> None:
        """What sacct knows, by its own names of fields; there is no accounting before this is called."""
        (self.folder / "accounted").write_text(json.dumps(rows))

    def probe_finds(self, found: dict[str, Any], state: str = "COMPLETED", code: int = 0) -> None:
        """What the next probes leave behind, by path in the run folder, and how Slurm says that they ended."""
        said = f"JobState={state} ExitCode={code}:0 NodeList=n[1-2]"
        (self.folder / "probe").write_text(json.dumps({"files": found, "said": said}))

    @property
    def jobs(self) -> list[dict[str, str]]:
        """The jobs that were taken."""
        return read_lines(self.folder / "jobs")

    @property
    def calls(self) -> list[list[str]]:
        """Every call, with the command's name first."""
        return read_lines(self.folder / "calls")


def main(folder: Path, name: str, words: list[str]) -> int:
    with (folder / "calls").open("a") as calls:
        calls.write(json.dumps([name, *words]) + "\n")
    if name == "sbatch":
        return _sbatch(folder, words)
    if (folder / "silent").exists():
        print(f"{name}: error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    if name == "scontrol" and words == ["ping"]:
        print("Slurmctld(primary) at head is UP")
    if name == "squeue":
        jobs = read_lines(folder / "jobs")
        seen = jobs[:-1] if jobs and jobs[-1]["late"] else jobs
        print("\n".join(f"{job['id']} {job['comment']}" for job in reversed(seen)))
    if name == "sinfo":
        print("batch*\nhigh")
    if name == "scontrol" and "hostnames" in words:
        print("n1\nn2")
    elif name == "scontrol" and "show" in words:
        state = (folder / "state").read_text() if (folder / "state").exists() else "PENDING"
        if not state:
            print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
            return 1
        probe = folder / f"probe-{words[-1]}"
        said = probe.read_text() if probe.exists() else f"JobState={state} ExitCode=0:0 NodeList=(null)"
        print(f"JobId={words[-1]} JobName=x Reason=None {said}")
    if name == "sacct":
        return _sacct(folder / "accounted", words)
    return 0


def _sacct(file: Path, words: list[str]) -> int:
    """Rows as sacct 22.05 prints them: in the order of ``--format``, with the batch step of each job unless told."""
    if not file.exists():
        print("Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    asked = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
    fields = asked["format"].split(",")
    if unknown := set(fields) - SACCT_FIELDS:
        print(f'sacct: fatal: Invalid field requested: "{unknown.pop()}"', file=sys.stderr)
        return 1
    rows = [] if "--noheader" in words else [{field: field for field in fields}]
    for row in json.loads(file.read_text()):
        if asked["jobs"] in (row["JobID"], row["JobID"].partition("_")[0]):
            rows += [row] if "--allocations" in words else [row, row | {"JobID": f"{row['JobID']}.batch"}]
    for row in rows:
        cells = [row[field] for field in fields]
        print("|".join(cells) if "--parsable2" in words else "".join(f"{cell[:10]:>10} " for cell in cells))
    return 0


def _probe(folder: Path, job: str) -> None:
    """Leave behind what a probe would, with its own token, in the run folder that sbatch is called in."""
    asked = json.loads(Path("slurm/probe-asked.json").read_text())
    told = json.loads((folder / "probe").read_text())
    for path, value in told["files"].items():
        text = value if isinstance(value, str) else json.dumps({**value, "token": asked["token"]})
        Path(path.replace("%j", job)).write_text(text)
    (folder / f"probe-{job}").write_text(told["said"])


def read_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _sbatch(folder: Path, words: list[str]) -> int:
    file = folder / "replies"
    waiting = file.read_text().splitlines() if file.exists() else []
    kind, _, message = (waiting.pop(0) if waiting else "ok").partition(" ")
    file.write_text("\n".join(waiting) + "\n" if waiting else "")
    if kind == "ok" and "--test-only" in words:
        return 0
    if kind in ("ok", "lose", "late"):
        comment = next(word.partition("=")[2] for word in words if word.startswith("--comment="))
        with (folder / "jobs").open("a") as jobs:
            number = 1 + sum(1 for _ in (folder / "jobs").open())
            value = {"id": str(number), "comment": comment, "script": words[-1], "cwd": str(Path.cwd())}
            value["late"] = kind == "late"
            jobs.write(json.dumps(value) + "\n")
        if kind == "ok":
            if words[-1].endswith("probe.sbatch") and (folder / "probe").exists():
                _probe(folder, str(number))
            print(number)
            return 0
    print(f"sbatch: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
