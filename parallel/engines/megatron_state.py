"""The training state of a megatron-core model as shards of logical tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from parallel.engines.megatron_galore import MATRICES
from parallel.shards import Box, Piece, Shard, flat_boxes

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Owned:
    """What the optimizer on this rank holds of one model parameter.

    ``main`` is the tensor that the optimizer steps: the parameter itself, its fp32 master copy, or a flat range
    ``[start, stop)`` of either (distributed optimizer).
    """

    optimizer: torch.optim.Optimizer
    main: torch.Tensor
    start: int
    stop: int
    is_master: bool


def owned(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> Owned | None:
    """Find a parameter in the optimizers of this rank; None when other data-parallel ranks own all of it."""
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            if parameter not in part.model_param_gbuf_map:
                continue
            if parameter not in part.model_param_group_index_map:
                return None
            group, order = part.model_param_group_index_map[parameter]
            reach = part._get_model_param_range_map(parameter)["param"]
            main = part.optimizer.param_groups[group]["params"][order]
            return Owned(part.optimizer, main, reach.start, reach.end, main.dtype != parameter.dtype)
        main = getattr(parameter, "main_param", parameter)
        if any(main is each for group in part.param_groups for each in group["params"]):
            return Owned(part.optimizer, main, 0, parameter.numel(), main is not parameter)
    return None


def gradients_ready(optimizer: MegatronOptimizer) -> float:
    """Put the whole step's gradients where the optimizer takes them from; returns their 2-norm before clipping."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def step(optimizer: MegatronOptimizer, clip_norm: float, norm: float) -> None:
    """What megatron-core's ``optimizer.step()`` does with ready gradients of this norm; ``clip_norm`` 0: no clip."""
    for part in parts(optimizer):
        if clip_norm and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, clip_norm, norm)
    optimizer.step_with_ready_grads()


def create_moments(optimizer: MegatronOptimizer) -> None:
    """Make Adam's state exist before the first step, so that it can be loaded and saved at any time."""
    for part in parts(optimizer):
        for group in part.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)


def set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set Adam's count of steps (bias correction), whichever Adam it is: torch counts per tensor, others per group."""
    for part in parts(optimizer):
        for group in part.param_groups:
            if "step" in group:
                group["step"] = steps
            for parameter in group["params"]:
                if "step" in part.optimizer.state[parameter]:
                    part.optimizer.state[parameter]["step"] = torch.tensor(float(steps))


def state_shards(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter, pieces: list[Piece]) -> Iterator[Shard]:
    """A trained parameter's weight, moments and (16-bit parameters) fp32 master copy as shards."""
    for piece in pieces:
        if 0 not in piece.box.size:
            yield Shard(piece.name, "weight", piece.shape, piece.box, parameter.data[piece.local.slices])
    holding = owned(optimizer, parameter)
    if holding is None:
        return
    state = holding.optimizer.state[holding.main]
    for matrix in state.get(MATRICES, ()):
        yield from matrix.shards()
    for kind in () if MATRICES in state else MOMENTS:
        yield from _flat_shards(kind, state[kind], holding, parameter, pieces)
    if holding.is_master:
        yield from _flat_shards("master", holding.main.data, holding, parameter, pieces)


def _flat_shards(
    kind: str, flat: torch.Tensor, holding: Owned, parameter: torch.nn.Parameter, pieces: list[Piece]
) -> Iterator[Shard]:
    """Cut a flat range of a local tensor into the boxes of the logical pieces that it covers."""
    shape = tuple(parameter.shape)
    flat = flat.view(-1)
    for box, at in flat_boxes(shape, holding.start, holding.stop):
        part = flat[at : at + box.elements].view(box.size)
        for piece in pieces:
            common = box.intersect(piece.local)
            if common is None:
                continue
            inside = common.shift(tuple(-offset for offset in box.offset))
            shape_there = piece.state_shape or piece.shape
            yield Shard(piece.name, kind, shape_there, _to_logical(common, piece), part[inside.slices])


def _to_logical(local: Box, piece: Piece) -> Box:
    return local.shift(tuple(a - b for a, b in zip(piece.box.offset, piece.local.offset, strict=True)))


def parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """The optimizers that an optimizer consists of, without those that have nothing to step on this rank."""
    if isinstance(optimizer, ChainedOptimizer):
        for part in optimizer.chained_optimizers:
            yield from parts(part)
    elif optimizer.optimizer is not None:
        yield optimizer
