"""PiSSA's start on all ranks of a stage: each decomposes some of the whole weights for all."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from parallel.engine import EngineSpec, TensorReader
from parallel.engines.megatron_model import DTYPES, base_values
from parallel.engines.megatron_teams import team_of
from parallel.groups import Groups
from parallel.lora import LoraPart
from parallel.names import whole_piece
from parallel.pissa import principal


def start(spec: EngineSpec, groups: Groups, chunks: Iterable[torch.nn.Module], base: TensorReader | None) -> None:
    """Fill A, B and their fixed halves; collective over the ranks that hold the same layers.

    The ranks decompose a weight each at the same time, so that each is decomposed once and everybody starts from the
    same bits.
    """
    parts = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LoraPart)]
    for is_expert in (False, True):
        team = team_of(groups, is_expert)
        mine = [part for part in parts if part.is_expert == is_expert]
        for first in range(0, len(mine), team.size):
            batch = list(enumerate(mine[first : first + team.size]))
            made = {turn: _decompose(spec, part, base) for turn, part in batch if team.is_mine(turn)}
            for turn, part in batch:
                a, b = made[turn] if turn in made else _room(part)
                team.share(a, turn)
                team.share(b, turn)
                fill(part, a, b)


def fill(part: LoraPart, a: torch.Tensor, b: torch.Tensor) -> None:
    """Start a part from whole matrices A ``[r, in]`` and B ``[out, r]``: both halves, so that the sum begins at W."""
    assert part.fixed_a is not None and part.fixed_b is not None
    mine_a, mine_b = a[part.pieces[0].box.slices], b[part.pieces[1].box.slices]
    for parameter, values in ((part.A, mine_a), (part.fixed_a, mine_a), (part.B, mine_b), (part.fixed_b, -mine_b)):
        parameter.data.copy_(values)


def _decompose(spec: EngineSpec, part: LoraPart, base: TensorReader | None) -> tuple[torch.Tensor, torch.Tensor]:
    assert spec.lora is not None
    empty_a, empty_b = _room(part)
    piece = whole_piece(f"{part.module_name}.weight", (empty_b.shape[0], empty_a.shape[1]))
    weight = base_values(spec, base, piece).to(empty_a.device, DTYPES[spec.precision])
    return principal(weight.float(), spec.lora.r, spec.lora.scale)


def _room(part: LoraPart) -> tuple[torch.Tensor, torch.Tensor]:
    shape_a, shape_b = part.pieces[0].state_shape, part.pieces[1].state_shape
    assert shape_a is not None and shape_b is not None
    return part.A.new_empty(shape_a), part.B.new_empty(shape_b)
