"""Rotary frequencies (Su et al. 2021, arXiv:2104.09864), plain or stretched for rows longer than first trained on."""

from __future__ import annotations

import math

import torch

from parallel.sequence import SequenceCut
from parallel.specs import RopeScaling


def frequencies(theta: float, width: int, scaling: RopeScaling | None = None) -> torch.Tensor:
    """By how much each pair of a head's features turns from one position to the next, fp32 ``[width / 2]``.

    Example:
        >>> frequencies(100.0, 4).tolist()
        [1.0, 0.10000000149011612]
        >>> frequencies(100.0, 4, RopeScaling("linear", 2.0)).tolist()
        [0.5, 0.05000000074505806]
    """
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = _llama3_share(plain, scaling) if scaling.kind == "llama3" else _yarn_share(theta, width, scaling)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _llama3_share(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """How much of each frequency stays: linear in the turns that it makes over the original positions."""
    turns = scaling.original_positions * plain / (2 * math.pi)
    return ((turns - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)


def _yarn_share(theta: float, width: int, scaling: RopeScaling) -> torch.Tensor:
    """The same, but linear in the number of the pair (arXiv:2309.00071, equation 23, as its reference code has it)."""

    def pair(turns: float) -> float:
        return width * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.fast), pair(scaling.slow)
    if scaling.whole_turns:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)
    return 1 - ramp.clamp(0, 1)


def angles(turns: torch.Tensor, tokens: int, cut: SequenceCut) -> torch.Tensor:
    """The angles of this rank's tokens of rows of ``tokens``, the second half of a head's features as the first.

    Args:
        turns: of :func:`frequencies`, ``[width / 2]``.
    Returns:
        fp32 ``[tokens / cp, 1, 1, width]``, as megatron-core's rotary embedding gives them.
    """
    positions = torch.arange(tokens, dtype=torch.float32, device=turns.device)
    half = torch.outer(cut.take(positions, 0), turns)
    return torch.cat([half, half], dim=-1)[:, None, None, :]
