"""Faults to plant in the ranks of a certificate: each is one that a well-known tool has had, or nearly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from orchestrator.certify.cell import train_cell
from parallel.sequence import SequenceCut

Row = tuple[int, int, int]


def fused_adapter_cut_plainly(*cell: Any) -> Any:
    """Fault 1: B of gate|up is saved as if its fused rows lay one rank under the other."""
    from parallel import names

    right = names.adapter_pieces

    def plainly(linear: Any, part: tuple[str, str], *rest: Any) -> Any:
        a, b = right(linear, part, *rest)
        tp, rank = rest[-2:]
        if part[0] not in ("gate", "up") or tp == 1:
            return a, b
        gate, up = (right(linear, one, *rest)[1].name for one in linear.parts)
        rows = b.box.size[0]
        place = 2 * rank * rows + (rows if part[0] == "up" else 0)  # among the 2 * tp * rows of gate, then up
        name, start = (gate, place) if place < tp * rows else (up, place - tp * rows)
        return a, replace(b, name=name, box=replace(b.box, offset=(start, 0)))

    with patch.object(names, "adapter_pieces", plainly):
        return train_cell(*cell)


def one_adapter_per_expert_rank(*cell: Any) -> Any:
    """Fault 4: the experts of a rank share one adapter, so that the model depends on how many ranks there are."""
    from parallel import lora
    from parallel.engines import megatron_model

    right = megatron_model.wrap_layer

    def shared(layer: torch.nn.Module, *args: Any) -> None:
        right(layer, *args)
        first, *others = layer.get_submodule("mlp.experts.local_experts").children()
        for other in others:
            for path, part in other.named_modules():
                if isinstance(part, lora.LoraPart):
                    of_first: Any = first.get_submodule(path)
                    part.A, part.B = of_first.A, of_first.B

    with patch.object(megatron_model, "wrap_layer", shared):
        return train_cell(*cell)


def expert_shares_not_summed(*cell: Any) -> Any:
    """Fault 5: under ETP the replicated half of an expert's adapter keeps its own rank's share of the gradient."""
    from parallel import lora

    right = lora.mark

    def unmarked(half: Any, *args: Any) -> None:
        right(half, *args)
        half.sum_over_expert_tp = False

    with patch.object(lora, "mark", unmarked):
        return train_cell(*cell)


def adapters_of_each_rank(*cell: Any) -> Any:
    """Fault 8: what an adapter starts from depends on the global rank."""
    from parallel import lora

    right = lora.kaiming_uniform
    with patch.object(lora, "kaiming_uniform", lambda shape, seed, *key: right(shape, seed + dist.get_rank(), *key)):
        return train_cell(*cell)


def loss_scaled_by_replicas(*cell: Any) -> Any:
    """Fault 9's kin: gradients are averaged over replicas as if each had the same count of labels."""
    from parallel.engines.megatron import MegatronEngine

    right = MegatronEngine._loss

    def scaled(self: Any, batch: Any, hidden: torch.Tensor) -> Any:
        total, tokens, log = right(self, batch, hidden)
        return total * self._groups.size("dp_cp"), tokens, log

    with patch.object(MegatronEngine, "_loss", scaled):
        return train_cell(*cell)


def recompute_cuts_the_graph(*cell: Any) -> Any:
    """The trap: a frozen embedding under full recompute, and nobody looks whether there are gradients."""
    from parallel.engines import megatron, megatron_model

    with (
        patch.object(megatron_model, "_let_hidden_states_require_grad", lambda *_: None),
        patch.object(megatron._GradientWatch, "finish", lambda self: [handle.remove() for handle in self._handles]),
    ):
        return train_cell(*cell)


def lost_all_reduce(*cell: Any) -> Any:
    """The replicated half of a column-parallel adapter keeps its own rank's share of the gradient."""
    from parallel.engines import megatron_model

    right = megatron_model.regions
    with patch.object(megatron_model, "regions", lambda groups: replace(right(groups), copy=lambda value: value)):
        return train_cell(*cell)


def dropped_sequence_reduction(*cell: Any) -> Any:
    """Under sequence parallelism the replicated half sees its own rank's tokens only, and nobody sums."""
    from parallel import lora

    right = lora.LoraPart.__init__

    def unmarked(self: Any, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        for half in (self.A, self.B):
            half.sequence_parallel = False

    with patch.object(lora.LoraPart, "__init__", unmarked):
        return train_cell(*cell)


def groups_cut_wrongly(*cell: Any) -> Any:
    """The fused q|k|v is cut as q, then k, then v, and not by key/value group."""
    from parallel import names

    right = names.local_rows

    def in_order(role: str, spec: Any, tp: int, rank: int) -> Iterator[Row]:
        if role not in ("q", "k", "v") or tp == 1:
            yield from right(role, spec, tp, rank)
            return
        queries, value = (names.shape(each, spec)[0] // tp for each in ("q", "k"))
        start = {"q": 0, "k": queries, "v": queries + value}[role]
        count = names.shape(role, spec)[0] // tp
        yield rank * count, start, count

    with patch.object(names, "local_rows", in_order):
        return train_cell(*cell)


def positions_of_each_rank(*cell: Any) -> Any:
    """Under context parallelism each rank turns its tokens as if its part of a row began the row."""
    from parallel.engines import megatron_rotary

    def from_zero(self: Any, max_seq_len: int, *_: Any, **__: Any) -> torch.Tensor:
        return megatron_rotary.angles(self.turns, max_seq_len // self.cut.size, SequenceCut())

    with patch.object(megatron_rotary.Rotary, "forward", from_zero):
        return train_cell(*cell)


def wrong_rotary_base(*cell: Any) -> Any:
    """Another base than the model's config has; every topology is wrong alike."""
    from parallel.engines import megatron_model

    right = megatron_model.frequencies
    with patch.object(megatron_model, "frequencies", lambda theta, *rest: right(theta / 4, *rest)):
        return train_cell(*cell)


def rank_that_fails(*cell: Any) -> Any:
    """No wrong number, but none at all."""
    if dist.get_rank() == 1:
        raise RuntimeError("the second rank has had enough")
    return train_cell(*cell)


def subspace_of_parts_in_another_order(*cell: Any) -> Any:
    """GaLore gathers a cut gradient with its parts the wrong way round before it is decomposed."""
    from parallel.engines.megatron_galore import Matrix

    right = Matrix.whole

    def turned(self: Matrix, local: torch.Tensor) -> torch.Tensor:
        whole = right(self, local)
        along = 0 if self.cut == self.axis else 1
        return whole if self.cut is None else torch.cat(whole.chunk(2, dim=along)[::-1], dim=along)

    with patch.object(Matrix, "whole", turned):
        return train_cell(*cell)


def directions_in_another_order(*cell: Any) -> Any:
    """GaLore's subspace is right beside other ranks, but two of its directions trade places: moments mix."""
    from parallel.engines import megatron_galore

    right = megatron_galore.subspace

    def traded(gradient: torch.Tensor, rank: int) -> torch.Tensor:
        basis = right(gradient, rank)
        return basis if dist.get_world_size() == 1 else basis[:, [1, 0, *range(2, basis.shape[1])]].contiguous()

    with patch.object(megatron_galore, "subspace", traded):
        return train_cell(*cell)
