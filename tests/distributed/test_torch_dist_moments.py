"""A run moves between megatron-core and here with its optimizer: what goes on is what would have gone on there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.load import CheckpointReader, open_checkpoint
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from orchestrator.cli import main
from parallel.shards import Box, Shard
from parallel.topology import Topology
from tests.helpers import megatron_trains, runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

AFTER = 2
# No padding of the vocabulary, whose rows megatron-core's own softmax counts.
DENSE = Run(full=True, steps=4, global_sequences=4, micro_sequences=2, changes=(("vocab_size", 102),))
GQA = DENSE.on(family="qwen2", changes=(*DENSE.changes, ("num_key_value_heads", 2)))
EXPERTS = DENSE.on(family="qwen3_moe", topology=Topology(dp=2, ep=2))
INTO = [
    pytest.param(DENSE.on(topology=Topology(tp=2)), "stacked", marks=pytest.mark.grid),
    (GQA.on(topology=Topology(tp=2, dp=2), distributed=True), "numbered"),
    pytest.param(GQA.on(topology=Topology(dp=2), distributed=True), "stacked", marks=pytest.mark.grid),
    pytest.param(EXPERTS, "stacked", marks=pytest.mark.grid),
    pytest.param(EXPERTS.on(distributed=True), "numbered", marks=pytest.mark.grid),
]


def states(checkpoint: CheckpointReader) -> dict[tuple[str, str], torch.Tensor]:
    return {
        key: checkpoint.read(*key, Box.whole(record.tensor.shape))
        for key, record in checkpoint.manifest.tensors.items()
    }


def brought_in(folder: Path, model: Path, out: Path) -> CheckpointReader:
    assert main(["convert", str(folder), str(out), "--model", str(model), "--moments"]) == 0
    return open_checkpoint(out, verify=True)


def close(ours: dict[Any, torch.Tensor], theirs: dict[Any, torch.Tensor]) -> None:
    """Each tensor to 1e-4 of its largest element."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=str(key))


@pytest.mark.parametrize(("run", "style"), INTO)
def test_a_run_of_megatron_core_goes_on_here(pool: Pool, tiny_model: Any, tmp_path: Path, run: Run, style: str) -> None:
    hf = tiny_model(run.family, **dict(run.changes))
    saved, ended = tmp_path / "saved/iter_0000002", tmp_path / "ended"
    words = (run, hf, saved, ended, AFTER, style, "fully_reshardable")
    there = pool.run(run.topology.world_size, megatron_trains.train_and_save, *words)[0]
    (tmp_path / "saved/latest_checkpointed_iteration.txt").write_text("2")
    checkpoint = brought_in(tmp_path / "saved", hf, tmp_path / "run")
    assert (checkpoint.step, checkpoint.state["optimizer_steps"], checkpoint.manifest.room) == (AFTER, AFTER, "model")
    arrays = {key: value.numpy() for key, value in states(checkpoint).items()}
    losses, pieces = pool.run(1, runs.go_on, run.on(topology=Topology(), distributed=False), arrays, AFTER)[0]
    assert losses == pytest.approx(there, rel=1e-5)
    close(runs.merge([pieces]), states(brought_in(ended, hf, tmp_path / "end")))


OUT = [
    DENSE.on(topology=Topology(tp=2)),
    pytest.param(GQA.on(topology=Topology(tp=2, dp=2), distributed=True), marks=pytest.mark.grid),
    pytest.param(GQA.on(topology=Topology(tp=2), precision="bf16"), marks=pytest.mark.grid),
    pytest.param(DENSE.on(topology=Topology(dp=2), precision="bf16", distributed=True), marks=pytest.mark.grid),
]


@pytest.mark.parametrize("run", OUT)
def test_a_run_of_ours_goes_on_in_megatron_core(pool: Pool, tiny_model: Any, tmp_path: Path, run: Run) -> None:
    """Moments and masters are ours bit for bit, in its optimizer and in what it saves of it; so is the next loss."""
    hf, alone = tiny_model(run.family, **dict(run.changes)), run.on(topology=Topology(), distributed=False)
    _, _, pieces = pool.run(1, runs.train, alone.on(steps=AFTER), str(hf))[0]
    tensors = runs.merge([pieces])
    sixteen_bit = run.precision == "bf16"
    shards = [
        Shard(name, kind, tuple(value.shape), Box.whole(tuple(value.shape)), value.bfloat16() if small else value)
        for (name, kind), value in tensors.items()
        for small in [sixteen_bit and kind == "weight"]
    ]
    schedule = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "schedule": "linear", "steps": 9}
    state = {"step": AFTER, "samples_consumed": 8, "optimizer_steps": AFTER, "schedule": schedule}
    contents = Contents("model", state, {"config.json": hf / "config.json"})
    checkpoint = open_checkpoint(save(tmp_path / "run/checkpoints", AFTER, shards, contents))
    assert main(["export", str(tmp_path / "run"), "--to", "torch_dist", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "2\n"
    words = (run, hf, tmp_path / "out/iter_0000002", tmp_path / "again", tensors)
    results = pool.run(run.topology.world_size, megatron_trains.load_and_go_on, *words)
    assert all(done == (AFTER, 8) and not wrong for done, wrong, *_ in results), results
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for *_, groups in results for group in groups)
    back, ours = states(brought_in(tmp_path / "again", hf, tmp_path / "back")), states(checkpoint)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], value) for key, value in ours.items())
    losses, _ = pool.run(1, runs.go_on, alone, {key: value.numpy() for key, value in tensors.items()}, AFTER)[0]
    assert results[0][2] == pytest.approx(losses, rel=1e-2 if sixteen_bit else 1e-5)
