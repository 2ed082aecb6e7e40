"""The frozen base of an adapter is the same to the last bit, however often the adapter is saved and exported."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.checkpoint.export import export_adapter, export_merged
from orchestrator.checkpoint.load import CheckpointReader
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from parallel.topology import Topology
from tests.helpers.pool import Pool
from tests.helpers.runs import Run, engine_spec, microbatches, open_engine

SAVES = 20
CONFIG = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'


def digests(engine: Any, groups: Any, run: Run) -> dict[str, str]:
    """The sha256 of every tensor of the base that this rank holds."""
    from parallel.engines.megatron_model import tensors

    return {
        piece.name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for tensor, piece in tensors(engine_spec(run), groups, engine._chunks)
        if "lora_" not in piece.name
    }


def train_and_save(run: Run, base: str, folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Train an adapter in bf16 and save it after every step; digests of the base before and after."""
    engine, groups = open_engine(run, base)
    before = digests(engine, groups, run)
    for step in range(SAVES):
        engine.train_step(microbatches(run, step, groups.coordinate("dp")), run.rate(step))
        checkpoint = save(Path(folder), step, engine.shards(), Contents("adapter", {}, {"adapter_config.json": CONFIG}))
        if dist.get_rank() == 0 and step % 5 == 4:
            export_adapter(checkpoint, Path(folder) / "../peft")
            export_merged(checkpoint, Path(base), Path(folder) / "../merged")
        dist.barrier()
    after = digests(engine, groups, run)
    engine._chunks[0].decoder.final_layernorm.weight.data[0] += 0.01
    assert digests(engine, groups, run) != after  # it would have been seen
    groups.close()
    return before, after


def test_twenty_saves_and_exports_leave_the_base_alone(pool: Pool, tiny_model: Any, tmp_path: Path) -> None:
    base = tiny_model("llama")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir()}
    run = Run(topology=Topology(tp=2), precision="bf16", targets=("q_proj",), learning_rate=1e-2, steps=SAVES)
    for before, after in pool.run(2, train_and_save, run, str(base), str(tmp_path / "checkpoints")):
        assert len(before) > 20 and before == after
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir()} == files
    first, last = (CheckpointReader(tmp_path / f"checkpoints/step-{step:06d}") for step in (0, SAVES - 1))
    assert all(
        first.manifest.tensors[key].sha256 != record.sha256 for key, record in last.manifest.tensors.items()
    )  # the adapter has moved
