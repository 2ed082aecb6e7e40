"""``python -m tests.slurm.transcript --write docs/launch.md --brief README.md``: a node is lost, on a real Slurm.

A run of SmolLM2 on four nodes is submitted, one of them loses power, and the run goes on with the other three; its last
loss is that of the same run in one process, left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from launch.environment import isotrain_cache
from orchestrator.marks import between_marks
from orchestrator.smollm2 import make_model
from tests.end_to_end.shell import wait_for
from tests.slurm.conftest import SlurmShell, login
from tests.slurm.rig import Cluster

MARK = "<!-- transcript: written by `python -m tests.slurm.transcript` -->"
JOB = "model=smollm2_135m data=lighthouse steps=8 batch.global_sequences=12 batch.sequence_tokens=64"
SUBMIT = f"isotrain submit {JOB} \\\n    cluster=slurm_cpu cluster.nodes=2-4 checkpoint.every_steps=2"
SUBMIT += " run_dir=runs/tide"
ALONE = f"isotrain train {JOB} \\\n    cluster=one run_dir=runs/undisturbed 2>&1 | tail -n 2"


def typed(shell: SlurmShell, command: str) -> str:
    """A command and what it shows; where this is happening is not shown."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=shell.folder, env=shell.environment, capture_output=True, text=True, check=True
    )
    shown = (done.stderr + done.stdout).replace(f"{shell.folder}/", "")
    return "\n".join(line.rstrip() for line in [f"$ {command}", *shown.splitlines()])


def record(cluster: Cluster, shell: SlurmShell) -> tuple[str, str]:
    """The transcript, and one with the last lines of the log only."""
    log = shell.folder / "runs" / "tide" / "metrics.jsonl"
    parts = [typed(shell, SUBMIT)]
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) >= 3)
    parts.append(typed(shell, "isotrain status runs/tide"))
    cluster.power_cut("node4")
    parts.append("(node4 loses power)")
    parts.append(typed(shell, "isotrain wait runs/tide"))
    whole, brief = (typed(shell, f"isotrain logs runs/tide{end}") for end in ("", " | tail -n 2"))
    alone = typed(shell, ALONE)
    return "\n\n".join([*parts, whole, alone]), "\n\n".join([*parts, brief, alone])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put it between the marks of this page")
    parser.add_argument("--brief", type=Path, metavar="PAGE", help="put it there with the end of the log only")
    pages = parser.parse_args()
    make_model()
    cluster = Cluster(4)
    try:
        cluster.up()
        with tempfile.TemporaryDirectory() as folder:
            shell = replace(login(cluster, Path(folder)), cache=isotrain_cache())  # the model is there
            whole, brief = record(cluster, shell)
    finally:
        cluster.down()
    for page, text in ((pages.write, whole), (pages.brief, brief)):
        if page is not None:
            page.write_text(between_marks(page.read_text(), MARK, f"```text\n{text}\n```"))
    if pages.write is None:
        print(whole)


if __name__ == "__main__":
    main()
