"""LoRA on sharded linears: one adapter per *logical* linear, so that it means what it means in PEFT.

A wrapped linear may be fused (q|k|v, gate|up); each logical part has its own A ``[r, in]`` and B ``[out, r]``
(Hu et al. 2021, arXiv:2106.09685: ``y = W x + (alpha / r) B A x``). Under tensor parallelism

- column-parallel: A is replicated and B cut by rows. Each rank sees only its rows' share of the gradient of ``A x``,
  so that share is summed over the group on the way back;
- row-parallel: A is cut by columns and B replicated. The partial products ``A x`` are summed on the way forth.

With sequence parallelism the replicated half sees only its rank's tokens, so its gradient is summed over the group
after the backward pass (``sequence_parallel`` on the parameter asks megatron-core for that).

An expert's linears are cut over etp, and there is one adapter per *logical* expert, on the expert-parallel rank that
holds it. The token dispatcher already brings an expert's tokens to all its etp ranks, and sums their outputs on the
way forth and their gradients on the way back. So nothing is reduced here: ``B A x`` is linear in either cut half, and
the replicated half gets this rank's share of its gradient (``sum_over_expert_tp`` on the parameter asks the engine to
add up the shares). A reduction here as well would count the tokens' gradient etp times, with no error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from parallel import names
from parallel.families.family import Linear
from parallel.fused import lora_linear
from parallel.lora_spec import LoraSpec
from parallel.pissa import pissa_pieces
from parallel.seeding import DropoutClock, kaiming_uniform
from parallel.shards import Piece
from parallel.specs import ModelSpec

Collective = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Regions:
    """The tensor-parallel collectives that adapters need, with the backward pass of each in brackets.

    ``copy``: identity (all-reduce); ``reduce``: all-reduce (identity); ``gather``: all-gather along tokens
    (reduce-scatter); ``scatter``: reduce-scatter along tokens (all-gather). ``sum_expert``: all-reduce over the ranks
    that share an expert (identity).
    """

    copy: Collective
    reduce: Collective
    gather: Collective
    scatter: Collective
    sum_expert: Collective


@dataclass(frozen=True)
class ExpertPlace:
    """Which experts a rank holds (``ep_rank`` of ``ep``), and which cut of them (``etp_rank`` of ``etp``)."""

    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0


@dataclass(frozen=True)
class LoraContext:
    """What every adapter of a model shares on one rank."""

    model: ModelSpec
    lora: LoraSpec
    seed: int
    tp: int
    tp_rank: int
    regions: Regions
    sequence_parallel: bool
    clock: DropoutClock
    experts: ExpertPlace = ExpertPlace()

    def part(self, linear: Linear, part: tuple[str, str], layer: int | None) -> LoraPart:
        """The adapter of one logical linear on this rank."""
        cut = (self.experts.etp, self.experts.etp_rank) if linear.expert else (self.tp, self.tp_rank)
        pieces = names.adapter_pieces(linear, part, self.model, layer, self.lora.r, *cut)
        made = LoraPart(*pieces, self.seed, linear, self.sequence_parallel)
        if self.lora.init == "pissa":
            made.add_fixed(pissa_pieces(*pieces))
        if self.lora.dora:
            piece = names.magnitude_piece(linear, part, self.model, layer, *cut)
            made.add_magnitude(piece, linear, self.sequence_parallel)
        return made


class LoraPart(torch.nn.Module):
    """The two halves of one logical linear's adapter on this rank, in fp32, and where they lie in the whole."""

    def __init__(self, piece_a: Piece, piece_b: Piece, seed: int, linear: Linear, sequence_parallel: bool) -> None:
        super().__init__()
        whole = kaiming_uniform(piece_a.shape, seed, "lora_A", piece_a.name)  # type: ignore[arg-type]
        self.A = torch.nn.Parameter(whole[piece_a.box.slices].contiguous())
        self.B = torch.nn.Parameter(torch.zeros(piece_b.box.size))
        self.pieces: tuple[Piece, ...] = (piece_a, piece_b)
        self.module_name = piece_a.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        self.is_expert = linear.expert
        mark(self.A, linear, linear.cut == "row", sequence_parallel)
        mark(self.B, linear, linear.cut == "column", sequence_parallel)
        self.magnitude: torch.nn.Parameter | None = None
        self.fixed_a: torch.nn.Parameter | None = None
        self.fixed_b: torch.nn.Parameter | None = None

    def add_fixed(self, pieces: tuple[Piece, ...]) -> None:
        """Give the part a second half of each matrix that does not learn; filled later.

        Args:
            pieces: where A, B, the fixed rows under A and the fixed columns beside B lie in tensors of rank ``2 r``.
        """
        self.fixed_a = torch.nn.Parameter(torch.zeros_like(self.A), requires_grad=False)
        self.fixed_b = torch.nn.Parameter(torch.zeros_like(self.B), requires_grad=False)
        self.pieces = pieces

    def down(self) -> torch.Tensor:
        """All rows that the input is multiplied with: A, and the fixed ones."""
        return self.A if self.fixed_a is None else torch.cat([self.A, self.fixed_a])

    def up(self) -> torch.Tensor:
        """All columns that go with :meth:`down`."""
        return self.B if self.fixed_b is None else torch.cat([self.B, self.fixed_b], dim=1)

    def tensors(self) -> Iterator[tuple[torch.nn.Parameter, Piece]]:
        """Its parameters with their pieces."""
        held = (self.A, self.B, self.fixed_a, self.fixed_b, self.magnitude)
        yield from zip([each for each in held if each is not None], self.pieces, strict=True)

    def add_magnitude(self, piece: Piece, linear: Linear, sequence_parallel: bool) -> None:
        """Give the part DoRA's magnitudes, cut over ranks and marked as its B is; they are filled later."""
        self.magnitude = torch.nn.Parameter(torch.ones(piece.box.size))
        self.pieces += (piece,)
        mark(self.magnitude, linear, linear.cut == "column", sequence_parallel)


def mark(half: torch.nn.Parameter, linear: Linear, is_cut: bool, sequence_parallel: bool) -> None:
    """Say over which ranks a half's gradient is summed, and whether other ranks hold the same half."""
    half.tensor_model_parallel = is_cut  # type: ignore[attr-defined]
    half.allreduce = not linear.expert  # type: ignore[attr-defined]
    half.sequence_parallel = sequence_parallel and not is_cut and not linear.expert  # type: ignore[attr-defined]
    half.sum_over_expert_tp = linear.expert and not is_cut  # type: ignore[attr-defined]


class ExpertTokens:
    """Which tokens of the run the experts of a layer on this rank are given, while a forward pass lasts.

    ``by_expert``: numbers (:meth:`parallel.seeding.DropoutClock.numbers`) of each local expert's; who dispatches
    fills it.
    """

    def __init__(self) -> None:
        self.by_expert: Sequence[torch.Tensor] = ()

    def of(self, linear: Linear) -> torch.Tensor:
        """The numbers of an expert's tokens."""
        return self.by_expert[int(linear.path.split(".")[-2])]


class LoraLinear(torch.nn.Module):
    """A frozen megatron-core linear with adapters on some of its logical parts.

    Takes and returns what the wrapped linear does: ``[s, b, in] -> ([s, b, out], bias)``, of an expert
    ``[tokens, in] -> ([tokens, out], bias)``.
    """

    def __init__(self, base: torch.nn.Module, layer: int | None, linear: Linear, context: LoraContext) -> None:
        super().__init__()
        self.base = base
        self.linear = linear
        self.context = context
        self.parts = torch.nn.ModuleDict()
        for role, path in linear.parts:
            if names.layer_prefix(layer) + path in context.lora.targets:
                self.parts[role] = context.part(linear, (role, path), layer)
        ranks = context.experts.etp if linear.expert else context.tp
        # the token dispatcher does it for experts; what is not cut needs no sum on the way
        self.reduces = ranks > 1 and not linear.expert and linear.cut != "whole"
        cut = ranks if linear.cut == "column" else 1
        self.widths = {role: names.shape(role, context.model)[0] // cut for role, _ in linear.parts}
        self.base_is_plain = any(name == "weight" for name, _ in base.named_parameters(recurse=False))
        self.tokens: ExpertTokens | None = None
        self.order: torch.Tensor | None
        self.register_buffer("order", self._fused_order(), persistent=False)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's output plus the scaled adapters'."""
        if self._can_fuse():
            return self._fused(hidden)
        out, bias = self.base(hidden, *args, **kwargs)
        low = self._reduce(self._project(hidden))
        return out + torch.nn.functional.linear(low, self._up(low.dtype)), bias

    def _can_fuse(self) -> bool:
        """Whether nothing lies between the matrix products: no collective, no dropout, no dequantisation."""
        dropping = self.context.lora.dropout and self.training
        return self.base_is_plain and not self.reduces and not dropping

    def _fused(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same in one pass: all parts' A one under the other, their B in the rows of the fused output."""
        base: Any = self.base
        apart, added = (base.bias, None) if base.skip_bias_add else (None, base.bias)
        return lora_linear(hidden, base.weight, added, self._down().to(hidden.dtype), self._up(hidden.dtype)), apart

    def _parts(self) -> list[LoraPart]:
        return list(self.parts.values())  # type: ignore[arg-type]

    def _down(self) -> torch.Tensor:
        """All parts' A one under the other, ``[parts * r, in]``."""
        return torch.cat([part.down() for part in self._parts()])

    def _up(self, dtype: torch.dtype) -> torch.Tensor:
        """All parts' scaled B as one matrix ``[out, parts * r]`` from ``A x`` to the fused output of this rank."""
        halves = {role: part.up() for role, part in zip(self.parts, self._parts(), strict=True)}
        nothing = next(iter(halves.values()))
        blocks = [halves.get(role, nothing.new_empty(width, 0)) for role, width in self.widths.items()]
        up = torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]
        if self.order is not None:
            up = up.index_select(0, self.order)
        return (up * self.context.lora.scale).to(dtype)

    def _fused_order(self) -> torch.Tensor | None:
        """Which row of q|k|v, one under the other, each row of the fused output is; None where that is the order.

        The fused output goes group by group: the query heads of a key/value group, its key, its value.
        """
        if "q" not in self.widths:
            return None
        rows = torch.arange(sum(self.widths.values())).split(list(self.widths.values()))
        groups = self.context.model.kv_heads // self.context.tp
        return torch.cat([each.view(groups, -1) for each in rows], dim=1).flatten()

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """``A x`` of all parts, ``[s, b, parts * r]``."""
        parts = self._parts()
        if not (self.context.lora.dropout and self.training):
            return torch.nn.functional.linear(hidden, self._down().to(hidden.dtype))
        return torch.cat(
            [torch.nn.functional.linear(self._drop(hidden, part), part.A.to(hidden.dtype)) for part in parts], dim=-1
        )

    def _drop(self, hidden: torch.Tensor, part: LoraPart) -> torch.Tensor:
        """Dropout whose mask belongs to the sample: a rank cuts its tokens or its features out of the whole mask.

        An expert's tokens have left their rows, and the mask belongs to the token.
        """
        context, keep = self.context, 1 - self.context.lora.dropout
        tokens, features = hidden.shape[0], hidden.shape[-1]
        if self.linear.expert:
            assert self.tokens is not None
            first = context.experts.etp_rank * features if self.linear.cut == "row" else 0
            numbers = self.tokens.of(self.linear)
            mask = context.clock.token_mask(part.module_name, numbers, range(first, first + features), keep)
        elif self.linear.cut == "row":
            mask = context.clock.mask(part.module_name, tokens, features * context.tp, keep)
            mask = mask.narrow(2, context.tp_rank * features, features)
        elif context.sequence_parallel:
            mask = context.clock.mask(part.module_name, tokens * context.tp, features, keep)
            mask = mask.narrow(0, context.tp_rank * tokens, tokens)
        else:
            mask = context.clock.mask(part.module_name, tokens, features, keep)
        return hidden * (mask.to(hidden.device, hidden.dtype) / keep)

    def _reduce(self, low: torch.Tensor) -> torch.Tensor:
        """Make ``A x`` whole where the cut left it partial, forth (row) or back (column)."""
        context = self.context
        if not self.reduces:
            return low
        if self.linear.cut == "row":
            return (context.regions.scatter if context.sequence_parallel else context.regions.reduce)(low)
        return (context.regions.gather if context.sequence_parallel else context.regions.copy)(low)


class LoraRouter(torch.nn.Module):
    """The adapter of a router, which every tensor-parallel rank holds whole."""

    def __init__(self, part: LoraPart, context: LoraContext, weight: Callable[[], torch.Tensor]) -> None:
        """``weight``: gives the router's own ``[experts, hidden]``."""
        super().__init__()
        self.part = part
        self.context = context
        self.weight = weight

    def up(self) -> torch.Tensor:
        """The scaled B."""
        return self.part.up() * self.context.lora.scale

    def dropped(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the adapter is given of ``[s, b, hidden]``, fp32; of some tokens only under sequence parallelism."""
        context, keep = self.context, 1 - self.context.lora.dropout
        if keep == 1 or not self.training:
            return hidden.float()
        tokens, parts = hidden.shape[0], context.tp if context.sequence_parallel else 1
        mask = context.clock.mask(self.part.module_name, tokens * parts, hidden.shape[-1], keep)
        mask = mask.narrow(0, context.tp_rank * tokens if parts > 1 else 0, tokens)
        return hidden.float() * (mask.to(hidden.device) / keep)

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The router's logits ``[..., experts]`` of ``[..., hidden]`` as the adapter changes them, fp32."""
        low = torch.nn.functional.linear(self.dropped(hidden), self.part.down())
        return logits.float() + torch.nn.functional.linear(low, self.up())


@dataclass(frozen=True)
class Kinds:
    """What adapts linears, and what routers."""

    linear: type[LoraLinear] = LoraLinear
    router: type[LoraRouter] = LoraRouter


def wrap_layer(
    layer: torch.nn.Module, index: int, context: LoraContext, kinds: Kinds, tokens: ExpertTokens | None = None
) -> None:
    """Put adapters on the targeted linears of one built layer.

    Args:
        index: the layer's, global, from 0.
        tokens: those that its experts are given, where there is dropout.
    """
    prefix = names.layer_prefix(index)
    for linear in names.linears(context.model, index, context.experts.ep, context.experts.ep_rank):
        if not any(prefix + path in context.lora.targets for _, path in linear.parts):
            continue
        if linear.is_router:
            router: Any = layer.get_submodule(linear.path)
            part = context.part(linear, linear.parts[0], index)
            router.adapter = kinds.router(part, context, partial(getattr, router, "weight"))
            continue
        parent_path, _, attribute = linear.path.rpartition(".")
        parent = layer.get_submodule(parent_path)
        wrapped = kinds.linear(getattr(parent, attribute), index, linear, context)
        wrapped.tokens = tokens
        setattr(parent, attribute, wrapped)


def adapter_tensors(layer: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, Piece]]:
    """Every adapter parameter under a module with its piece, in a fixed order."""
    for module in layer.modules():
        if isinstance(module, LoraPart):
            yield from module.tensors()
