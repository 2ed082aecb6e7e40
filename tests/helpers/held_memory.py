"""What a rank of a short run holds, measured: parameters, gradients, optimizer state, and saved tensors at their peak.

Saved tensors are what autograd keeps for the backward pass (``torch.autograd.graph.saved_tensors_hooks``). A storage
counts once, whole, as long as anything of it is kept; the model's parameters and buffers are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from orchestrator.planning.counts import TunerExtras, Workload
from orchestrator.planning.estimate import setup_of
from orchestrator.planning.memory import StageMemory, stage_memory
from orchestrator.planning.setup import Setup
from parallel.capabilities import Proposal
from parallel.specs import ClusterSpec
from tests.helpers.runs import Run, engine_spec, microbatches, open_engine


@dataclass
class SavedTensors:
    """Counts the bytes of storages that autograd keeps; ``peak``: the most at a time, with what was kept then."""

    ours: frozenset[int]
    bytes: int = 0
    peak: int = 0
    _kept: Counter[int] = field(default_factory=Counter)

    def pack(self, tensor: torch.Tensor) -> _Saved:
        return _Saved(self, tensor)

    def add(self, key: int, size: int) -> None:
        if key not in self.ours and not self._kept[key]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self._kept[key] += 1

    def remove(self, key: int, size: int) -> None:
        self._kept[key] -= 1
        if key not in self.ours and not self._kept[key]:
            self.bytes -= size


class _Saved:
    """A tensor that autograd keeps: counted until it is let go."""

    def __init__(self, counter: SavedTensors, tensor: torch.Tensor) -> None:
        self.tensor, self.counter = tensor, counter
        storage = tensor.untyped_storage()
        self.place = (storage.data_ptr(), storage.nbytes())
        counter.add(*self.place)

    def __del__(self) -> None:
        self.counter.remove(*self.place)


def unpack(saved: _Saved) -> torch.Tensor:
    """What a pack hook has kept, as it was."""
    return saved.tensor


def _bytes(tensors: Iterable[torch.Tensor], besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages of tensors, each once, without those of others."""
    known = {one.untyped_storage().data_ptr() for one in besides}
    sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(size for key, size in sizes.items() if key not in known)


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Moments and master weights of megatron-core's optimizers, chained or not."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in one.optimizer.param_groups:
            yield from group["params"]
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


def held(run: Run) -> tuple[int, dict[str, int]] | None:
    """This rank's stage, and its bytes by the planner's owners after two steps; None beyond the topology."""
    engine, groups = open_engine(run)
    if engine is None:
        return None
    mine = [tensor for chunk in engine._chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
    batches = microbatches(run, 0, groups.coordinate("dp"))
    engine.train_step(batches, run.rate(0))
    saved = SavedTensors(frozenset(tensor.untyped_storage().data_ptr() for tensor in mine))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack):
        engine.train_step(batches, run.rate(0))
    parameters = [one for chunk in engine._chunks for one in chunk.parameters()]
    buffers = [part for one in engine._wrapped for part in (*one.buffers, *one.expert_parallel_buffers)]
    found = {
        "weights": sum(one.numel() * one.element_size() for one in parameters),
        "gradients": _bytes(part.grad_data for part in buffers),
        "optimizer": _bytes(_optimizer_tensors(engine._optimizer), parameters),
        "activations": saved.peak,
    }
    stage = groups.coordinate("pp")
    engine.close()
    groups.close()
    return stage, found


def predicted(run: Run) -> tuple[StageMemory, ...]:
    """What the planner says of the same run."""
    return stage_memory(planned(run))


def planned(run: Run) -> Setup:
    """A run as the planner sees it."""
    spec = engine_spec(run)
    lora = spec.lora
    proposal = Proposal(
        topology=run.topology,
        vpp=run.vpp,
        sp=run.sp,
        global_sequences=run.global_sequences,
        micro_sequences=run.micro_sequences,
        tuner="full" if run.full else "lora",
        quantise=run.quantise,
        recompute=run.recompute,
        precision=run.precision,
        cp_comm=run.cp_comm,
        distributed=run.distributed,
    )
    work = Workload(
        model=run.model,
        proposal=proposal,
        stages=spec.stages,
        row_tokens=run.tokens,
        adapted=frozenset(lora.targets) if lora else frozenset(),
        adapter_rank=lora.r if lora else 0,
        device="cpu",
        extras=TunerExtras(run.dora, run.init == "pissa", frozenset(spec.frozen) if run.full else lora.saved),
    )
    return setup_of(work, ClusterSpec("here", 1, run.topology.world_size))
