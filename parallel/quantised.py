"""A frozen linear whose weight is NF4: shard by shard from the base's files, the same codes on every topology.

Each logical part (q, k, v, gate, up, ...) is quantised as it is in the model's files. Its blocks of 64 lie in one row,
so a rank quantises only its own shard. Second-level statistics belong to the whole logical tensor: for these the ranks
put their scales (one for 64 elements) together, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from parallel.fused import product
from parallel.lora import Collective, Regions
from parallel.nf4 import BLOCK, OUTER_BLOCK, dequantise, dynamic_table, quantise, quantise_scales
from parallel.shards import Piece


class QuantisedLinear(torch.nn.Module):
    """Stands where megatron-core's linear was: ``[s, b, in] -> ([s, b, out], bias)``, with the same collectives.

    Args:
        linear: what it replaces; its bias is kept, its weight dropped.
        cut: ``column`` or ``row``.
        regions: the tensor-parallel collectives; None for one rank.
    """

    HELD = ("codes", "scale_codes", "first_block", "mean", "outer", "table")
    """Names of the buffers that are its weight."""
    codes: torch.Tensor
    scale_codes: torch.Tensor
    first_block: torch.Tensor
    mean: torch.Tensor
    outer: torch.Tensor
    table: torch.Tensor

    def __init__(self, linear: Any, cut: str, regions: Regions | None, sequence_parallel: bool) -> None:
        super().__init__()
        self.cut = cut
        self.shape: tuple[int, int] = tuple(linear.weight.shape)
        self.dtype: torch.dtype = linear.weight.dtype
        self.bias: torch.nn.Parameter | None = linear.bias
        self.skip_bias_add: bool = linear.skip_bias_add
        self._before, self._after = _around(cut, regions, sequence_parallel)

    def fill(self, pieces: Iterable[Piece], read: Callable[[Piece], torch.Tensor], gather: Collective | None) -> None:
        """Quantise this rank's shard, a piece at a time; all tensor-parallel ranks call it.

        Args:
            pieces: where the logical weights lie in the local one.
            read: gives a piece's values.
            gather: adds the ranks' tensors up; None for one rank.
        """
        rows, columns = self.shape
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        scale_codes = torch.empty(rows, columns // BLOCK, dtype=torch.uint8)
        first_block, mean = torch.empty(rows, 1, dtype=torch.int64), torch.empty(rows, 1)
        outers: list[torch.Tensor] = []
        by_name: dict[str, list[Piece]] = {}
        for piece in pieces:
            by_name.setdefault(piece.name, []).append(piece)
        for part in by_name.values():
            whole = torch.zeros(part[0].shape[0], part[0].shape[1] // BLOCK)
            for piece in part:
                here, scales = quantise(read(piece).to(self.dtype))
                codes[piece.local.slices[0]] = here
                whole[_blocks(piece)] = scales
            if gather is not None:
                whole = gather(whole)
            packed = quantise_scales(whole)
            start = sum(map(len, outers)) * OUTER_BLOCK
            for piece in part:
                local = piece.local.slices[0]
                scale_codes[local] = packed.codes[_blocks(piece)]
                mean[local] = packed.mean
                first = torch.arange(piece.box.offset[0], piece.box.offset[0] + piece.box.size[0]) * whole.shape[1]
                first_block[local] = (start + first + piece.box.offset[1] // BLOCK)[:, None]
            outers.append(packed.outer)
        held = {"codes": codes, "scale_codes": scale_codes, "first_block": first_block, "mean": mean}
        for name, tensor in (held | {"outer": torch.cat(outers), "table": dynamic_table()}).items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def is_filled(self) -> bool:
        """Whether it has its weight."""
        return "codes" in self._buffers

    @property
    def weight(self) -> torch.Tensor:
        """The weight of this rank ``[out, in]``, made anew at every call."""
        count = self.scale_codes.shape[1]
        blocks = self.first_block + torch.arange(count, device=self.codes.device)
        scales = self.table[self.scale_codes.int()] * self.outer[blocks // OUTER_BLOCK] + self.mean
        return dequantise(self.codes, scales, self.dtype)

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The product with the dequantised weight, which is given back at once, and made again in the backward pass."""
        out = self._after(_Product.apply(self._before(hidden), self))
        if self.bias is None or self.skip_bias_add:
            return out, self.bias
        return out + self.bias, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, linear: QuantisedLinear) -> torch.Tensor:
        ctx.linear = linear
        rows = hidden.reshape(-1, hidden.shape[-1])
        return product(rows, linear.weight.t()).view(*hidden.shape[:-1], linear.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        return product(rows, ctx.linear.weight).view(*grads[0].shape[:-1], ctx.linear.shape[1]), None


def _blocks(piece: Piece) -> tuple[slice, slice]:
    """Where a piece's scales lie among those of the whole weight."""
    rows, columns = piece.box.slices
    return rows, slice(columns.start // BLOCK, columns.stop // BLOCK)


def _around(cut: str, regions: Regions | None, sequence_parallel: bool) -> tuple[Collective, Collective]:
    """What a cut linear does before and after its product."""
    if regions is None:
        return _same, _same
    if cut == "column":
        return (regions.gather if sequence_parallel else regions.copy), _same
    return _same, (regions.scatter if sequence_parallel else regions.reduce)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
