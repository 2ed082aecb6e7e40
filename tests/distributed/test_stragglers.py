"""A rank that holds the others up is named in a real run, and none is where all are alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.certify.cell import write_rows
from orchestrator.commands import plan_job
from orchestrator.config.loading import compose_job
from orchestrator.runs import write_run
from tests.helpers.pool import Pool
from tests.helpers.slow import train_with_a_slow_rank

LAYOUTS = {"dp2": ["topology.dp=2"], "tp2·pp2": ["topology.tp=2", "topology.pp=2"]}


@pytest.fixture
def prepared(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, str, int]:
    """A run folder and rows for a tiny model on a topology, and how many ranks it has."""
    name, steps = request.param
    shape = ["model=smollm2_135m", "model.weights=random", "cluster=laptop", f"steps={steps}", "metrics.progress=false"]
    small = "{num_hidden_layers:4,hidden_size:48,num_attention_heads:6,num_key_value_heads:6,intermediate_size:96,"
    small += "vocab_size:128,model_type:llama,max_position_embeddings:64,rms_norm_eps:1e-5,tie_word_embeddings:true}"
    batch = ["batch.global_sequences=8", "batch.sequence_tokens=24", "checkpoint.every_steps=0"]
    planned = plan_job(compose_job([*shape, f"model.config={small}", *batch, *LAYOUTS[name]]))
    folder = tmp_path / "run"
    write_run(folder, replace(planned.job, run_dir=str(folder)), planned.plan.to_json())
    write_rows(tmp_path / "rows", 128, 5)
    return str(folder), str(tmp_path / "rows"), planned.plan.ranks_used


@pytest.mark.parametrize("prepared", [("dp2", 20), ("tp2·pp2", 20)], indirect=True, ids=LAYOUTS)
def test_a_rank_that_sleeps_is_named_within_twenty_steps(prepared: tuple[str, str, int], pool: Pool) -> None:
    folder, rows, ranks = prepared
    slow = ranks - 1
    said = pool.run(ranks, train_with_a_slow_rank, folder, rows, slow, 0.3)
    assert f"step 20: rank {slow} (" in said[0] and "in a step, ranks with the same part of the model" in said[0]
    assert said[0].count("holds them up") == 1 and not any(said[1:])


@pytest.mark.faults  # a minute
@pytest.mark.parametrize("prepared", [("tp2·pp2", 200)], indirect=True, ids=["tp2·pp2"])
def test_nobody_is_named_where_all_are_alike(prepared: tuple[str, str, int], pool: Pool) -> None:
    folder, rows, ranks = prepared
    assert not any(pool.run(ranks, train_with_a_slow_rank, folder, rows, -1, 0.0))
