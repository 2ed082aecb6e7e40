"""Run folders as runs leave them, without running any."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

from orchestrator.config.building import job_to_yaml
from orchestrator.history import Launch
from orchestrator.pace import RankPace
from orchestrator.planning.memory import GIB
from orchestrator.planning.plan import make_plan
from tests.pages.jobs import H100X64, JOB, LLAMA3_8B

BEGAN = 1_700_000_000.0


def write_run_folder(folder: Path, steps: int = 300, ranks: int = 64) -> Path:
    """A run of two launches: the first lost a rank at 60 % of the steps, and went on from there an hour later."""
    folder.mkdir(parents=True)
    plan = make_plan(JOB, LLAMA3_8B, H100X64)
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "job.yaml").write_text(job_to_yaml(replace(JOB, steps=steps, run_dir=str(folder))))
    broke = 6 * steps // 10
    started = [BEGAN, BEGAN + broke + 3600]
    starts = [{"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)), "host": "node1"} for at in started]
    _write_lines(folder / "environment.jsonl", starts)
    layout = (ranks, str(plan.topology))
    launches = [
        Launch(started[0], started[0] + broke + 5, 86, "Killed", 7, "rank 7 was killed by SIGKILL", broke, *layout),
        Launch(started[1], started[1] + steps - broke, 0, "done", None, "", steps, *layout),
    ]
    _write_lines(folder / "launches.jsonl", [asdict(one) for one in launches])
    _write_lines(folder / "metrics.jsonl", [_step(step, started[step > broke]) for step in range(1, steps + 1)])
    (folder / "paces").mkdir()
    for rank in range(ranks):
        pace = RankPace(rank, f"node{rank // 8}", 100, steps, 0.9, 1.0, 1.5, steps - 3, 0.01 + rank / 1000, 30 * GIB)
        (folder / "paces" / f"rank-{rank}.json").write_text(json.dumps(asdict(pace)))
    for step in (broke, steps):
        saved = folder / "checkpoints" / f"step-{step:06d}"
        saved.mkdir(parents=True)
        about = {"metrics": {"loss": 2.0}, "topology": {"pp": 4, "dp": 16, "tp": 1}}
        (saved / "manifest.json").write_text(json.dumps({"about": about, "files": {"a": {"bytes": 2**20}}}))
    return folder


def _step(step: int, started: float) -> dict[str, float | None]:
    spiky = 9.5 if step == 123 else 2 + math.exp(-step / 50)
    return {
        "step": step,
        "time": started + step,
        "loss": None if step == 77 else spiky,
        "grad_norm": 1.0,
        "learning_rate": 1e-4 * step,
        "tokens": 1000,
        "step_s": 1.0 + step % 7 / 100,
        "tokens_per_s": 1000.0 - step % 7,
        "mfu": 0.4,
        "peak_memory_bytes": 31 * GIB,
    }


def _write_lines(file: Path, lines: list[dict[str, object]] | list[dict[str, float | None]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
