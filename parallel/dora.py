"""DoRA on sharded linears: length and direction of each output row learn apart, per *logical* linear as in PEFT.

With ``V = W + s B A`` (``s`` is LoRA's scale) a row of the adapted weight is ``m V / |V|``; the length ``|V|`` is taken
for a constant in the backward pass (Liu et al. 2024, arXiv:2402.09353, equation 5 and section 4.3). So

    y = m / |V| * (W x + s B A x) + bias.

``V`` is never built: with ``D = A`` of all parts and ``U = s B`` in the rows of the fused output,

    |V|^2 = |W|^2 + 2 <W D^T, U> + <U (D D^T), U>, each row by row.

Column-parallel ranks hold whole rows. Row-parallel ranks hold some columns of every row: their shares of ``|V|^2`` are
summed over the group. The magnitudes ``m`` are cut (or replicated, and their gradients summed) as B is. An expert is
cut over etp. The token dispatcher sums its partial outputs; ``m / |V|``, the same on all of these ranks, may as well be
multiplied before that.

With dropout, as in PEFT, the adapter sees the dropped input and so does the correction of the base:
``y = W x + bias + (m / |V| - 1) W drop(x) + m / |V| s B A drop(x)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from parallel.fused import lora_linear
from parallel.lora import LoraLinear, LoraPart, LoraRouter

BLOCK_ROWS = 1024  # of a 16-bit weight that are in fp32 at a time


class DoraLinear(LoraLinear):
    """A frozen linear whose adapters have magnitudes; :meth:`start` fills these once the base has its weights."""

    square: torch.Tensor

    def start(self) -> None:
        """Set every magnitude to the length of its row of W; all tensor-parallel ranks call it."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        square = torch.cat([rows.float().square().sum(dim=1) for rows in weight.detach().split(BLOCK_ROWS)])
        self.register_buffer("square", square, persistent=False)
        lengths = self._over_rows(square).sqrt().split(list(self.widths.values()))
        for role, length in zip(self.widths, lengths, strict=True):
            if role in self.parts:
                self._magnitude(role).data.copy_(length)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's output with its adapted rows turned and stretched."""
        base: Any = self.base
        factor = self._factor()
        if self._can_fuse():
            out = lora_linear(hidden, base.weight, None, self._down().to(hidden.dtype), self._up(hidden.dtype))
            out = _stretch(out, factor)
            if base.skip_bias_add or base.bias is None:
                return out, base.bias
            return out + base.bias, None
        out, bias = self.base(hidden, *args, **kwargs)
        added = None if base.skip_bias_add else base.bias
        if self.context.lora.dropout and self.training:
            dropped = [self._drop(hidden, part) for part in self._parts()]
            lows = [linear(each, part.A.to(each.dtype)) for each, part in zip(dropped, self._parts(), strict=True)]
            low = self._reduce(torch.cat(lows, dim=-1))
            change = _stretch(linear(low, self._up(low.dtype)), factor)
            return out + change + _stretch(self._base_of(dropped), factor - 1), bias
        if added is not None:
            out = out - added
        low = self._reduce(self._project(hidden))
        out = _stretch(out + linear(low, self._up(low.dtype)), factor)
        return out if added is None else out + added, bias

    def _factor(self) -> torch.Tensor:
        """``m / |V|`` of every row of this rank's fused output, 1 where no adapter is; fp32 ``[out]``."""
        lengths = self._lengths()
        blocks = [
            self._magnitude(role) if role in self.parts else lengths.new_zeros(width)
            for role, width in self.widths.items()
        ]
        adapted = [lengths.new_full((width,), role in self.parts) for role, width in self.widths.items()]
        magnitudes, chosen = torch.cat(blocks), torch.cat(adapted).bool()
        if self.order is not None:
            magnitudes, chosen = magnitudes[self.order], chosen[self.order]
        return torch.where(chosen, magnitudes / lengths, torch.ones_like(lengths))

    @torch.no_grad()
    def _lengths(self) -> torch.Tensor:
        """``|W + s B A|`` of every row of the fused output; a constant, in fp32."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        down, up = self._down(), self._up(torch.float32)
        crossed = torch.cat([rows.float() @ down.t() for rows in weight.split(BLOCK_ROWS)])
        square = self.square + ((2 * crossed + up @ (down @ down.t())) * up).sum(dim=1)
        return self._whole(square).clamp_(min=0).sqrt_()

    def _whole(self, square: torch.Tensor) -> torch.Tensor:
        """Squares over whole rows: the ranks of a row-parallel linear hold some columns each."""
        if self.linear.cut != "row":
            return square
        if self.linear.expert:
            return self.context.regions.sum_expert(square.clone())
        return self.context.regions.reduce(square.clone()) if self.context.tp > 1 else square

    @torch.no_grad()
    def _over_rows(self, square: torch.Tensor) -> torch.Tensor:
        """Squares over whole rows, of the parts one under the other."""
        square = self._whole(square)
        return square if self.order is None else torch.empty_like(square).index_copy_(0, self.order, square)

    def _magnitude(self, role: str) -> torch.nn.Parameter:
        part = self.parts[role]
        assert isinstance(part, LoraPart) and part.magnitude is not None
        return part.magnitude

    def _base_of(self, dropped: list[torch.Tensor]) -> torch.Tensor:
        """Each adapted part's W times its own dropped input, in the rows of the fused output; 0 elsewhere."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        inputs = dict(zip(self.parts, dropped, strict=True))
        row_of = torch.arange(weight.shape[0], device=weight.device) if self.order is None else self.order.argsort()
        outs = {}
        for role, rows in zip(self.widths, row_of.split(list(self.widths.values())), strict=True):
            if role not in inputs:
                continue
            if self.linear.cut == "row":
                outs[role] = self._reduce(linear(inputs[role], weight))
            else:
                outs[role] = linear(self._reduce(inputs[role]), weight[rows])
        some = next(iter(outs.values()))
        blocks = [
            outs[role] if role in outs else some.new_zeros(*some.shape[:-1], width)
            for role, width in self.widths.items()
        ]
        out = torch.cat(blocks, dim=-1)
        return out if self.order is None else out.index_select(-1, self.order)


class DoraRouter(LoraRouter):
    """The adapter of a router with magnitudes; :meth:`start` fills these once the router has its weights."""

    def start(self) -> None:
        """Set every magnitude to the length of its row of W."""
        self._magnitude().data.copy_(torch.linalg.vector_norm(self.weight().float(), dim=1))

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The logits with their rows turned and stretched, fp32."""
        weight = self.weight().float()
        with torch.no_grad():
            lengths = torch.linalg.vector_norm(weight + self.up() @ self.part.down(), dim=1)
        factor = self._magnitude() / lengths
        if not (self.context.lora.dropout and self.training):
            return super().forward(hidden, logits) * factor
        dropped = self.dropped(hidden)
        change = linear(linear(dropped, self.part.down()), self.up())
        return logits.float() + linear(dropped, weight) * (factor - 1) + change * factor

    def _magnitude(self) -> torch.nn.Parameter:
        assert self.part.magnitude is not None
        return self.part.magnitude


def _stretch(out: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``out * factor`` in fp32, back in the type of ``out``: in bf16 a factor of 1.001 would be 1."""
    return (out * factor).to(out.dtype)
