"""NF4 with double quantisation, row by row: the format of bitsandbytes, in torch alone (QLoRA, arXiv:2305.14314).

A weight ``[out, in]`` is stored as 4-bit numbers of one table (section 3, "4-bit NormalFloat"), two in a byte, with one
scale (the largest magnitude) for each 64 elements of a row. The scales of a *whole* weight, less their mean, are stored
as 8-bit numbers of another table (dynamic tree quantisation, arXiv:2110.02861, section 2), with one fp32 for each 256
of them ("double quantisation"). As rows are whole blocks, any cut along rows, and along columns at multiples of 64, has
the codes of the uncut weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

BLOCK = 64  # elements of a row with one scale
OUTER_BLOCK = 256  # scales of a whole weight with one fp32
# Quantiles of the normal distribution, scaled into [-1, 1]: appendix E of the paper.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_SMALLEST = 1e-38  # what a block of zeros is divided by


@dataclass(frozen=True)
class Scales:
    """The scales of a whole weight in 8 bits. ``codes``: uint8, as many as scales; ``outer``: fp32, one for 256 codes;
    ``mean``: fp32 scalar, taken off before."""

    codes: torch.Tensor
    outer: torch.Tensor
    mean: torch.Tensor


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows, or a part of rows that is whole blocks.

    Args:
        weight: ``[rows, columns]`` with ``columns`` a multiple of 64.
    Returns:
        Codes, uint8 ``[rows, columns / 2]`` (the first of two elements in the upper half), and scales, fp32
        ``[rows, columns / 64]``.
    Example:
        >>> codes, scales = quantise(torch.linspace(-3, 3, 64)[None])
        >>> codes[0, 0].item(), codes[0, -1].item(), scales.item()
        (0, 255, 3.0)
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"NF4 needs rows of whole blocks of {BLOCK}, not of {columns} elements")
    blocks = weight.float().reshape(rows, -1, BLOCK)
    scales = blocks.abs().amax(dim=-1)
    unit = (blocks * (1.0 / scales.clamp(min=_SMALLEST))[..., None]).clamp_(-1, 1)
    table = torch.tensor(NF4, device=weight.device)
    numbers = torch.bucketize(unit, (table[:-1] + table[1:]) / 2).to(torch.uint8).reshape(rows, columns)
    return numbers[:, ::2] << 4 | numbers[:, 1::2], scales


def quantise_scales(scales: torch.Tensor) -> Scales:
    """Quantise all scales of a whole weight; the mean is exact to fp32, so that it does not depend on threads.

    Example:
        >>> packed = quantise_scales(torch.tensor([[1.0, 3.0]]))
        >>> packed.mean.item(), packed.outer.tolist(), packed.codes.tolist()
        (2.0, [1.0], [[0, 255]])
    """
    mean = scales.double().mean().float()
    flat = (scales - mean).reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % OUTER_BLOCK)).view(-1, OUTER_BLOCK)
    outer = padded.abs().amax(dim=1)
    unit = (padded * (1.0 / outer.clamp(min=_SMALLEST))[:, None]).clamp_(-1, 1).reshape(-1)[: flat.numel()]
    table = dynamic_table().to(scales.device)
    codes = torch.bucketize(unit, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return Scales(codes.view(scales.shape), outer, mean)


def dynamic_table() -> torch.Tensor:
    """The 256 numbers of the 8-bit format: for each power of ten a number of midpoints that doubles; 0; and 1.

    Example:
        >>> table = dynamic_table()
        >>> table.shape, table[-1].item(), int((table == 0).sum())
        (torch.Size([256]), 1.0, 1)
    """
    values = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        middles = 10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def restore_scales(packed: Scales) -> torch.Tensor:
    """The scales of a whole weight from their 8-bit form, in fp32 and their shape."""
    outer = packed.outer.repeat_interleave(OUTER_BLOCK)[: packed.codes.numel()].view(packed.codes.shape)
    return dynamic_table().to(packed.codes.device)[packed.codes.int()] * outer + packed.mean


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    """What a whole weight ``[out, in]`` is after it was stored in NF4, in its own type.

    Example:
        >>> round_trip(torch.linspace(-1, 1, 128)[None])[0, :3].round(decimals=2).tolist()
        [-1.0, -1.0, -1.0]
    """
    codes, scales = quantise(weight)
    return dequantise(codes, restore_scales(quantise_scales(scales)), weight.dtype)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``table[code] * scale``: by bitsandbytes where it is installed, else by torch.

    Args:
        codes: uint8 ``[rows, columns / 2]``; scales: fp32 ``[rows, columns / 64]``.
    Returns:
        ``[rows, columns]`` in ``dtype``.
    """
    if has_bitsandbytes():
        import bitsandbytes  # noqa: F401  registers its operators

        shape = (codes.shape[0], 2 * codes.shape[1])
        flat = torch.ops.bitsandbytes.dequantize_4bit(codes, scales.reshape(-1), BLOCK, "nf4", shape, dtype)
        return flat.view(shape)
    return dequantise_by_torch(codes, scales, dtype)


def dequantise_by_torch(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reference of :func:`dequantise`.

    Example:
        >>> codes = torch.full((1, 32), 0xF7, dtype=torch.uint8)
        >>> dequantise_by_torch(codes, torch.tensor([[2.0]]), torch.float32)[0, :3]
        tensor([2., 0., 2.])
    """
    table = torch.tensor(NF4, device=codes.device)
    # Both numbers of a byte are looked up at once, as 64 bits: ten times as fast as rows of two (on 2 cores of a CPU).
    pairs = torch.cartesian_prod(table, table).view(torch.float64).view(-1)
    found = pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32)
    blocks = found.view(codes.shape[0], -1, BLOCK).mul_(scales[..., None])
    return blocks.to(dtype).view(codes.shape[0], -1)


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None
