"""The frozen base of QLoRA in a megatron-core model: its linears are replaced before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from parallel import names
from parallel.device import current_device
from parallel.engine import EngineSpec
from parallel.families.family import Linear
from parallel.groups import Groups
from parallel.lora import LoraLinear, Regions
from parallel.quantised import QuantisedLinear
from parallel.shards import Piece


def replace_linears(
    spec: EngineSpec, groups: Groups, layers: Iterable[tuple[int, torch.nn.Module]], regions: Regions
) -> None:
    """Put a :class:`QuantisedLinear` in the place of every linear of these ``(global index, layer)``, experts' too.

    megatron-core has made their weights on the CPU and has not written to them, so they never took memory.
    """
    for index, layer in layers:
        for linear in _linears(spec, groups, index):
            parent_path, _, attribute = linear.path.rpartition(".")
            parent = layer.get_submodule(parent_path)
            sums = groups.topology.tp > 1 and not linear.expert  # an expert's outputs are the dispatcher's to sum
            where = regions if sums else None
            setattr(parent, attribute, QuantisedLinear(getattr(parent, attribute), linear.cut, where, spec.sp))


def _linears(spec: EngineSpec, groups: Groups, layer: int) -> list[Linear]:
    """The linears of a layer on this rank that are quantised, as ``names.quantised_weights`` has it."""
    every = names.linears(spec.model, layer, groups.topology.ep, groups.index("ep"))
    return [linear for linear in every if not linear.is_router]


def fill(
    spec: EngineSpec,
    groups: Groups,
    layers: Iterable[tuple[int, torch.nn.Module]],
    read: Callable[[Piece], torch.Tensor],
) -> None:
    """Quantise the weights of these ``(global index, layer)``, a linear at a time; collective over tp and etp.

    Linears that have their weights already, which are the same on all ranks, are passed over.
    """
    for index, layer in layers:
        for linear in _linears(spec, groups, index):
            module = layer.get_submodule(linear.path)
            base = module.base if isinstance(module, LoraLinear) else module
            assert isinstance(base, QuantisedLinear)
            if base.is_filled:
                continue
            group = groups.by_name["expt_tp" if linear.expert else "tp"]
            ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
            pieces = names.weight_pieces(linear, spec.model, index, ranks, rank)
            base.fill(pieces, read, partial(_summed, group) if ranks > 1 else None)


def _summed(group: torch.distributed.ProcessGroup, scales: torch.Tensor) -> torch.Tensor:
    there = scales.to(current_device())
    torch.distributed.all_reduce(there, group=group)
    return there.to(scales.device)
