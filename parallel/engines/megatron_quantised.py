"""The frozen base of QLoRA in a megatron-core model: its linears are replaced before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from parallel import names
from parallel.device import current_device
from parallel.engine import EngineSpec
from parallel.groups import Groups
from parallel.lora import LoraLinear, Regions
from parallel.quantised import QuantisedLinear
from parallel.shards import Piece


def replace_linears(spec: EngineSpec, groups: Groups, layers: Iterable[torch.nn.Module], regions: Regions) -> None:
    """Put a :class:`QuantisedLinear` in the place of every linear of these layers.

    megatron-core has made their weights on the CPU and has not written to them, so they never took memory.
    """
    where = regions if groups.topology.tp > 1 else None
    for layer in layers:
        for linear in names.linears(spec.model, 0):  # of a dense model, whose layers are alike
            parent_path, _, attribute = linear.path.rpartition(".")
            parent = layer.get_submodule(parent_path)
            setattr(parent, attribute, QuantisedLinear(getattr(parent, attribute), linear.cut, where, spec.sp))


def fill(
    spec: EngineSpec,
    groups: Groups,
    layers: Iterable[tuple[int, torch.nn.Module]],
    read: Callable[[Piece], torch.Tensor],
) -> None:
    """Quantise the weights of these ``(global index, layer)``, a linear at a time; collective over tp."""
    tp, rank, group = groups.topology.tp, groups.coordinate("tp"), groups.by_name["tp"]

    def summed(scales: torch.Tensor) -> torch.Tensor:
        there = scales.to(current_device())
        torch.distributed.all_reduce(there, group=group)
        return there.to(scales.device)

    for index, layer in layers:
        for linear in names.linears(spec.model, index):
            module = layer.get_submodule(linear.path)
            base = module.base if isinstance(module, LoraLinear) else module
            assert isinstance(base, QuantisedLinear)
            base.fill(names.weight_pieces(linear, spec.model, index, tp, rank), read, summed if tp > 1 else None)
