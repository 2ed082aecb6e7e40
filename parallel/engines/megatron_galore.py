"""GaLore in a megatron-core run: every *logical* linear has a projector and moments of its own, whatever its cut.

A linear's weight is cut over tensor-parallel ranks along the projected side or along the other one. Along the
projected side each rank has some rows of the projector, and the projected gradient is a sum over the group; along the
other side each has the whole projector and some columns of the moments, and nothing is sent. Only where the subspace is
chosen anew is a whole gradient needed: one rank after the other gathers one, and they are decomposed at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from parallel import names
from parallel.engine import EngineSpec
from parallel.engines.megatron_teams import Team, team_of
from parallel.galore import AdamStep, normed, subspace
from parallel.galore_spec import GaloreSpec
from parallel.groups import Groups
from parallel.shards import Box, Piece, Shard

MATRICES = "matrices"  # in the optimizer's state of a parameter: its logical matrices


class Matrix:
    """One logical matrix's part on this rank, with its projector and its moments, in fp32.

    Inside, the projected side comes first: ``projector`` is ``[this rank's projected side, rank]``, each moment
    ``[rank, this rank's other side]``.
    """

    def __init__(self, pieces: Sequence[Piece], spec: GaloreSpec, team: Team, device: torch.device) -> None:
        """``pieces``: of one matrix; together a block of its rows or of its columns, or all of it."""
        self.pieces = sorted(pieces, key=lambda piece: piece.box)
        self.name, self.shape = pieces[0].name, pieces[0].shape
        first = self.pieces[0].box
        self.box = Box(first.offset, (sum(piece.box.size[0] for piece in self.pieces), first.size[1]))
        self.axis = spec.axis(self.shape)  # type: ignore[arg-type]
        self.cut = next((axis for axis in (0, 1) if self.box.size[axis] < self.shape[axis]), None)
        self.team = team
        (side, self.rank), (_, other) = self.shapes = spec.shapes(self.shape)  # type: ignore[arg-type]
        self.projector = torch.zeros(self._here(side, self.axis), self.rank, device=device)
        self.exp_avg, self.exp_avg_sq = (
            torch.zeros(self.rank, self._here(other, 1 - self.axis), device=device) for _ in range(2)
        )

    def _here(self, length: int, axis: int) -> int:
        return self.box.size[axis] if self.cut == axis else length

    def part(self, local: torch.Tensor) -> torch.Tensor:
        """This matrix's part of a local tensor, the projected side first; a copy where the part is in pieces."""
        parts = [local[piece.local.slices] for piece in self.pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.t() if self.axis == 1 else whole

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        """All of the matrix, the projected side first; all ranks of the cut call it."""
        part = self.part(local)
        if self.cut is None:
            return part
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.team.cut))]
        dist.all_gather(parts, part, group=self.team.cut)
        return torch.cat(parts, dim=0 if self.cut == self.axis else 1)

    def take(self, projector: torch.Tensor) -> None:
        """Project on these directions of the whole side from now on."""
        start = self.box.offset[self.axis]
        self.projector.copy_(projector[start : start + len(self.projector)])

    def step(self, main: torch.Tensor, gradient: torch.Tensor, scale: float, group: Mapping[str, Any]) -> None:
        """One step of Adam, with its decay apart (arXiv:1711.05101), on this rank's part of ``main``."""
        low = self.projector.t() @ self.part(gradient)
        if self.cut == self.axis:
            dist.all_reduce(low, group=self.team.cut)
        step = AdamStep(group["step"], group["betas"], group["eps"])
        change = self.projector @ normed(low, self.exp_avg, self.exp_avg_sq, step)
        if self.axis == 1:
            change = change.t()
        start = 0
        for piece in self.pieces:
            rows = piece.box.size[0]
            target = main[piece.local.slices]
            target.mul_(1 - group["lr"] * group["weight_decay"])
            target.sub_(change[start : start + rows], alpha=group["lr"] * scale)
            start += rows

    def shards(self) -> Iterator[Shard]:
        """The projector and the moments as pieces of logical tensors."""
        (side, rank), (_, other) = self.shapes
        at = [self.box.offset[axis] if self.cut == axis else 0 for axis in (self.axis, 1 - self.axis)]
        place = Box((at[0], 0), tuple(self.projector.shape))
        yield Shard(self.name, "projector", (side, rank), place, self.projector)
        for kind, moment in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            yield Shard(self.name, kind, (rank, other), Box((0, at[1]), tuple(moment.shape)), moment)


class GaloreAdamW(torch.optim.AdamW):
    """AdamW that takes the parameters of :attr:`matrices` through GaLore and leaves the rest as they are.

    A parameter group's ``step`` counts steps, so that it is set after a load as other Adams' are.
    """

    def __init__(self, groups: list[dict[str, Any]], spec: GaloreSpec, team: Team) -> None:
        """``groups``: of an AdamW that this one stands in for; the same objects stay in use."""
        super().__init__(groups)
        self._spec, self._team = spec, team
        for group in self.param_groups:
            group["step"] = 0

    def project(self, main: torch.Tensor, parts: Iterable[Sequence[Piece]]) -> None:
        """Take a parameter, of which these are the pieces of each logical matrix, through GaLore."""
        self.state[main][MATRICES] = [Matrix(pieces, self._spec, self._team, main.device) for pieces in parts]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; gradients of projected parameters are let go."""
        held = [
            (group, main) for group in self.param_groups for main in group["params"] if MATRICES in self.state[main]
        ]
        if held and held[0][0]["step"] % self._spec.update_steps == 0:
            self._choose_subspaces([(matrix, main.grad) for _, main in held for matrix in self.state[main][MATRICES]])
        for group in self.param_groups:
            group["step"] += 1
        for group, main in held:
            gradient, main.grad = main.grad, None  # AdamW passes over what has none
            for matrix in self.state[main][MATRICES]:
                matrix.step(main, gradient, self._spec.scale, group)
        return super().step(closure)

    def _choose_subspaces(self, matrices: Sequence[tuple[Matrix, torch.Tensor]]) -> None:
        """Decompose each whole gradient on one rank, and give its projector to all that hold a part of it."""
        for first in range(0, len(matrices), self._team.size):
            batch = matrices[first : first + self._team.size]
            mine: dict[int, torch.Tensor] = {}
            for turn, (matrix, gradient) in enumerate(batch):
                if self._team.in_my_row(turn):
                    whole = matrix.whole(gradient)
                    mine |= {turn: whole} if self._team.is_mine(turn) else {}
            found = {turn: subspace(whole, self._spec.rank) for turn, whole in mine.items()}
            for turn, (matrix, gradient) in enumerate(batch):
                directions = found[turn] if turn in found else gradient.new_empty(matrix.shapes[0])
                self._team.share(directions, turn)
                matrix.take(directions)


def install(
    parts: Iterable[MegatronOptimizer],
    spec: EngineSpec,
    groups: Groups,
    tensors: Iterable[tuple[torch.Tensor, Piece]],
) -> None:
    """Let megatron-core's optimizers, which are new, step the linears of the layers through GaLore.

    Args:
        parts: those that step parameters; of experts there is one apart.
        tensors: every local weight with each logical piece in it.
    """
    assert spec.galore is not None
    linears = {f"{path}.weight" for path in names.target_modules(spec.model)}
    pieces: dict[torch.Tensor, dict[str, list[Piece]]] = {}
    for tensor, piece in tensors:
        if piece.name in linears:
            main = getattr(tensor, "main_param", tensor)
            pieces.setdefault(main, {}).setdefault(piece.name, []).append(piece)
    for part in parts:
        team = team_of(groups, any(group["is_expert_parallel"] for group in part.param_groups))
        part.optimizer = stepper = GaloreAdamW(part.param_groups, spec.galore, team)
        for group in part.param_groups:
            for main in group["params"]:
                if main in pieces:
                    stepper.project(main, pieces[main].values())
