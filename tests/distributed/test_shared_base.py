"""Several LoRA runs on one frozen base, a step of each in turn: bit for bit what each is alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.topology import Topology
from tests.helpers import runs
from tests.helpers.cells import in_grid
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

PLAIN = (
    Run(steps=3),
    Run(steps=4, learning_rate=3e-3, warmup_steps=2, targets=("q_proj", "down_proj"), dropout=0.2),
    Run(steps=2, seed=5, eps=1e-6, global_sequences=4),
)
TUNERS = (
    Run(steps=2, dora=True),
    Run(steps=2, init="pissa"),
    Run(steps=2, modules_to_save=("embed_tokens", "norm"), learning_rate=2e-3),
    Run(steps=2, targets=("embed_tokens", "v_proj"), lr_ratio=4.0),
)
MIXED = (Run(family="qwen3_moe", targets=r".*\.(self_attn|mlp)\..*", dropout=0.1), Run(family="qwen3_moe", seed=4))
PACKS = {"num_hidden_layers": 2, "hidden_size": 192, "head_dim": 64, "intermediate_size": 384}
PACKS |= {"num_attention_heads": 6, "num_key_value_heads": 6}
Trained = tuple[list[float], list[float], list[tuple[Any, ...]]]


def train_in_turns(them: Sequence[Run], base_folder: str) -> tuple[list[Trained], int, int]:
    """Train runs of one topology, a step of each in turn, on one base.

    Returns:
        Losses, norms and pieces of each; the bytes of all their frozen tensors, counted once where they are the same
        memory, and those of the base alone.
    """
    from pathlib import Path

    from orchestrator.checkpoint.hf_reader import HfReader
    from parallel.engines.megatron import MegatronEngine
    from parallel.engines.megatron_base import SharedBase
    from parallel.groups import open_groups

    groups, shared = open_groups(them[0].topology, dist.get_rank()), SharedBase()
    reader = HfReader(Path(base_folder))
    engines = [MegatronEngine(runs.engine_spec(run), groups, reader, shared) for run in them]
    alone = shared.bytes
    results: list[list[Any]] = [[] for _ in them]
    for step in range(max(run.steps for run in them)):
        for run, engine, found in zip(them, engines, results, strict=True):
            if step < run.steps:
                batches = runs.microbatches(run, step, groups.coordinate("dp"))
                found.append(engine.train_step(batches, run.rate(step)))
    trained = [
        ([one.loss for one in found], [one.grad_norm for one in found], runs.pieces(engine))
        for found, engine in zip(results, engines, strict=True)
    ]
    held = {tensor.data_ptr(): tensor.nbytes for engine in engines for tensor in _frozen(engine)}
    groups.close()
    return trained, sum(held.values()), alone


def _frozen(engine: Any) -> list[torch.Tensor]:
    from parallel.lora import LoraPart
    from parallel.quantised import QuantisedLinear

    chunks = engine._chunks
    fixed = {id(one) for chunk in chunks for part in chunk.modules() if isinstance(part, LoraPart)
             for one in part.parameters()}  # fmt: skip
    frozen = [one for chunk in chunks for one in chunk.parameters() if not one.requires_grad and id(one) not in fixed]
    packed = [one for chunk in chunks for each in chunk.modules() if isinstance(each, QuantisedLinear)
              for one in each.buffers()]  # fmt: skip
    return frozen + packed


CELLS = {
    "one": ("llama", {}, PLAIN),
    "tp2-sp": ("llama", {"topology": Topology(tp=2), "sp": True}, PLAIN),
    "pp2": ("llama", {"topology": Topology(pp=2)}, PLAIN),
    "dp2-distributed": ("llama", {"topology": Topology(dp=2), "distributed": True}, PLAIN),
    "tuners": ("llama", {}, TUNERS),
    "nf4-tp2": ("llama", {"topology": Topology(tp=2), "quantise": "nf4", "changes": tuple(PACKS.items())}, PLAIN),
    "experts-ep2": ("qwen3_moe", {"topology": Topology(dp=2, ep=2)}, MIXED),
}
FINER = ("one", "pp2", "dp2-distributed")  # test_turns.py has these


@pytest.mark.parametrize("cell", in_grid(CELLS, FINER))
def test_runs_that_take_turns_on_one_base_are_bit_for_bit_those_alone(pool: Pool, tiny_model: Any, cell: str) -> None:
    """Losses, gradient norms, adapters and moments are equal; the frozen tensors of all are one set in memory."""
    family, place, them = CELLS[cell]
    here = [run.on(**place) for run in them]
    folder = str(tiny_model(family, **dict(here[0].changes)))
    world = here[0].topology.world_size
    together = pool.run(world, train_in_turns, here, folder)
    for number, run in enumerate(here):
        alone = pool.run(world, runs.train, run, folder)
        losses, norms, _ = together[0][0][number]
        assert (losses, norms) == (alone[0][0], alone[0][1]) and len(losses) == run.steps
        ours, theirs = (runs.merge(states) for states in ([rank[0][number][2] for rank in together],
                                                          [state for _, _, state in alone]))  # fmt: skip
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())
    for _, held, base in together:
        assert held == base
