"""LoRA on sharded linears: one adapter per *logical* linear, so that it means what it means in PEFT.

A wrapped linear may be fused (q|k|v, gate|up); each logical part has its own A ``[r, in]`` and B ``[out, r]``
(Hu et al. 2021, arXiv:2106.09685: ``y = W x + (alpha / r) B A x``). Under tensor parallelism

- column-parallel: A is replicated and B cut by rows. Each rank sees only its rows' share of the gradient of ``A x``,
  so that share is summed over the group on the way back;
- row-parallel: A is cut by columns and B replicated. The partial products ``A x`` are summed on the way forth.

With sequence parallelism the replicated half sees only its rank's tokens, so its gradient is summed over the group
after the backward pass (``sequence_parallel`` on the parameter asks megatron-core for that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from parallel import names
from parallel.lora_spec import LoraSpec
from parallel.seeding import DropoutClock, kaiming_uniform
from parallel.shards import Piece
from parallel.specs import ModelSpec

Collective = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Regions:
    """The tensor-parallel collectives that adapters need, with the backward pass of each in brackets.

    ``copy``: identity (all-reduce); ``reduce``: all-reduce (identity); ``gather``: all-gather along tokens
    (reduce-scatter); ``scatter``: reduce-scatter along tokens (all-gather).
    """

    copy: Collective
    reduce: Collective
    gather: Collective
    scatter: Collective


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


class LoraPart(torch.nn.Module):
    """The two halves of one logical linear's adapter on this rank, in fp32, and where they lie in the whole."""

    def __init__(self, piece_a: Piece, piece_b: Piece, seed: int, cut: str, sequence_parallel: bool) -> None:
        super().__init__()
        whole = kaiming_uniform(piece_a.shape, seed, "lora_A", piece_a.name)  # type: ignore[arg-type]
        self.A = torch.nn.Parameter(whole[piece_a.box.slices].contiguous())
        self.B = torch.nn.Parameter(torch.zeros(piece_b.box.size))
        self.pieces = (piece_a, piece_b)
        self.module_name = piece_a.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        sharded, replicated = (self.A, self.B) if cut == "row" else (self.B, self.A)
        sharded.tensor_model_parallel = True  # type: ignore[attr-defined]
        sharded.partition_dim = 1 if cut == "row" else 0  # type: ignore[attr-defined]
        replicated.tensor_model_parallel = False  # type: ignore[attr-defined]
        replicated.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


class LoraLinear(torch.nn.Module):
    """A frozen megatron-core linear with adapters on some of its logical parts.

    Takes and returns what the wrapped linear does: ``[s, b, in] -> ([s, b, out], bias)``.
    """

    def __init__(self, base: torch.nn.Module, layer: int, linear: names.Linear, context: LoraContext) -> None:
        super().__init__()
        self.base = base
        self.linear = linear
        self.context = context
        self.parts = torch.nn.ModuleDict()
        for role, path in linear.parts:
            if names.layer_prefix(layer) + path in context.lora.targets:
                pieces = names.adapter_pieces(
                    linear, (role, path), context.model, layer, context.lora.r, context.tp, context.tp_rank
                )
                self.parts[role] = LoraPart(*pieces, context.seed, linear.cut, context.sequence_parallel)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's output plus the scaled adapters'."""
        out, bias = self.base(hidden, *args, **kwargs)
        low = self._reduce(self._project(hidden))
        deltas, start = {}, 0
        for role, part in self.parts.items():
            width = part.A.shape[0]
            deltas[role] = torch.nn.functional.linear(low[..., start : start + width], part.B.to(low.dtype))
            start += width
        return out + self._assemble(deltas, out) * self.context.lora.scale, bias

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """``A x`` of all parts, ``[s, b, parts * r]``."""
        parts: list[LoraPart] = list(self.parts.values())  # type: ignore[arg-type]
        if not (self.context.lora.dropout and self.training):
            stacked = torch.cat([part.A for part in parts]).to(hidden.dtype)
            return torch.nn.functional.linear(hidden, stacked)
        return torch.cat(
            [torch.nn.functional.linear(self._drop(hidden, part), part.A.to(hidden.dtype)) for part in parts], dim=-1
        )

    def _drop(self, hidden: torch.Tensor, part: LoraPart) -> torch.Tensor:
        """Dropout whose mask belongs to the sample: a rank cuts its tokens or its features out of the whole mask."""
        context, keep = self.context, 1 - self.context.lora.dropout
        tokens, features = hidden.shape[0], hidden.shape[-1]
        if self.linear.cut == "row":
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
        if context.tp == 1:
            return low
        if self.linear.cut == "row":
            return (context.regions.scatter if context.sequence_parallel else context.regions.reduce)(low)
        return (context.regions.gather if context.sequence_parallel else context.regions.copy)(low)

    def _assemble(self, deltas: dict[str, torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """Lay the parts' outputs out as the fused output is."""
        roles = [role for role, _ in self.linear.parts]
        if len(roles) == 1:
            return deltas[roles[0]]
        if roles[0] == "q":
            return self._assemble_qkv(deltas, out)
        half = out.shape[-1] // 2
        missing = out.new_zeros(*out.shape[:-1], half)
        return torch.cat([deltas.get(role, missing) for role in roles], dim=-1)

    def _assemble_qkv(self, deltas: dict[str, torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """Group by group: the query heads of a key/value group, its key, its value."""
        model = self.context.model
        groups = model.kv_heads // self.context.tp
        columns = []
        for role in ("q", "k", "v"):
            heads = model.heads // model.kv_heads if role == "q" else 1
            size = (*out.shape[:-1], groups, heads * model.head_dim)
            columns.append(deltas[role].view(size) if role in deltas else out.new_zeros(size))
        return torch.cat(columns, dim=-1).view(out.shape)


def wrap_layer(layer: torch.nn.Module, index: int, context: LoraContext) -> None:
    """Put adapters on the targeted linears of one built layer (``index`` is global, from 0)."""
    for linear in names.linears(context.model):
        prefix = names.layer_prefix(index)
        if not any(prefix + path in context.lora.targets for _, path in linear.parts):
            continue
        parent_path, _, attribute = linear.path.rpartition(".")
        parent = layer.get_submodule(parent_path)
        setattr(parent, attribute, LoraLinear(getattr(parent, attribute), index, linear, context))


def adapter_tensors(layer: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, Piece]]:
    """Every adapter parameter under a module with its piece, in a fixed order."""
    for module in layer.modules():
        if isinstance(module, LoraPart):
            yield module.A, module.pieces[0]
            yield module.B, module.pieces[1]
