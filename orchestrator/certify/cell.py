"""One cell: the loop of ``isotrain train`` on the ranks of a topology, over rows that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.store import DataSummary, StoreWriter, TokenisedData

LONGEST_ROW, ROWS = 24, 36


def write_rows(folder: Path, vocabulary: int, seed: int) -> None:
    """Rows of several lengths with random tokens, of which a random part is learned, as a tokenised data set."""
    random = np.random.Generator(np.random.PCG64(seed))
    folder.mkdir(parents=True)
    with StoreWriter(folder) as writer:
        for _ in range(ROWS):
            length = int(random.integers(LONGEST_ROW // 2, LONGEST_ROW + 1))
            learned = random.random(length) < 0.7
            learned[-1] = True
            writer.add(random.integers(0, vocabulary, length).astype(np.int32), learned)
        counts = (writer.rows, writer.tokens, writer.label_tokens, writer.longest_row_tokens)
        writer.finish(DataSummary("certify", "certify", f"seed-{seed}", *counts, 0, LONGEST_ROW, 0))


def train_cell(run_dir: str, rows: str, probe: list[list[int]]) -> Any:
    """Train the run of ``run_dir`` as this rank; leaves metrics.jsonl and a checkpoint there.

    Args:
        run_dir: holds job.yaml and plan.json.
        rows: a folder of :func:`write_rows`.
        probe: token ids ``[rows, tokens]``, of a length that the topology can cut.
    Returns:
        The trained model's logits of ``probe`` as an array ``[rows, tokens, vocabulary]``; None before the last stage.
    """
    import torch
    import torch.distributed as dist

    from launch.stop import StopRequest
    from orchestrator.assemble import load_adapter, open_engine, room
    from orchestrator.config.building import read_job
    from orchestrator.loop import train
    from orchestrator.metrics import Metrics
    from orchestrator.models import model_spec
    from orchestrator.planning.plan import Plan
    from orchestrator.training import Cursor, Run
    from parallel.groups import open_groups

    folder, rank = Path(run_dir), dist.get_rank()
    job, plan = read_job(folder), Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    groups = open_groups(plan.topology, rank)
    cpu_group = dist.new_group(backend="gloo")
    engine: Any = open_engine(job, plan, groups)
    load_adapter(job, engine)
    metrics = Metrics(job.metrics, folder, job.steps) if rank == 0 else None
    data = TokenisedData.open(Path(rows))
    files = room(job, model_spec(job.model))
    train(Run(job, plan, folder, groups, cpu_group, engine, data, files, metrics), Cursor(), StopRequest())
    if metrics is not None:
        metrics.close()
    logits = engine.logits(torch.tensor(probe))
    engine.close()
    groups.close()
    return None if logits is None else logits.numpy()
