"""One block of attention with its log-sum-exp: queries against some of the keys, and the gradients of that share.

Blocks that see different keys are merged by their log-sum-exp (:func:`merge`). The backward pass needs no merging: with
the log-sum-exp and the output of the *whole* attention, a block's gradients are its share of the whole (Dao et al.
2022, arXiv:2205.14135, appendix B.4: ``P = exp(S - lse)``, ``dS = P * (dP - rowsum(dO * O))``).

torch's fused kernels that give the log-sum-exp are private operators. They are named here and nowhere else, and a test
holds each that this host can run against :data:`TILES`, the definition in plain matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

TILE_TOKENS = 128

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rules:
    """How a layer scores keys and which it sees beside causality.

    ``scale`` multiplies the scores; ``cap`` bounds them by ``cap * tanh(score / cap)`` (0: nothing does); a query sees
    the last ``window`` tokens, itself among them (0: all before it).
    """

    scale: float
    cap: float = 0.0
    window: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether fused kernels can do it."""
        return not self.cap and not self.window

    def over(self, tokens: int) -> Rules:
        """The rules over rows of ``tokens``: a window that is no shorter hides nothing.

        Example:
            >>> Rules(1.0, window=8).over(8).is_plain, Rules(1.0, window=8).over(9).is_plain
            (True, False)
        """
        return replace(self, window=0) if self.window >= tokens else self


@dataclass(frozen=True)
class Window:
    """What queries at some places of a row see of keys at others: themselves and the ``size - 1`` tokens before.

    ``query_at [s]`` and ``key_at [t]`` are ascending positions in the row, on the CPU.
    """

    size: int
    query_at: torch.Tensor
    key_at: torch.Tensor

    def keys_of(self, start: int, stop: int) -> tuple[int, int]:
        """Between which keys lie all that the queries ``start .. stop`` see."""
        first, last = int(self.query_at[start]), int(self.query_at[stop - 1])
        ends = torch.tensor([first - self.size + 1, last + 1])
        begin, end = torch.searchsorted(self.key_at, ends).tolist()
        return begin, end

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> torch.Tensor:
        """Which keys each query does not see, ``[queries, keys]``."""
        here, there = (each.to(device, non_blocking=True) for each in (self.query_at[queries], self.key_at[keys]))
        distance = here[:, None] - there
        return (distance < 0) | (distance >= self.size)


@dataclass(frozen=True)
class Block:
    """A block before it is computed: ``query [b, heads, s, d]``, ``key`` and ``value [b, groups, t, d]``.

    ``causal``: query ``i`` sees the keys up to ``i`` (then ``s == t``); otherwise it sees all of them. Query head ``h``
    uses key/value head ``h // (heads / groups)``. ``scale`` and ``cap`` as in :class:`Rules`; a ``window`` says what is
    seen in place of ``causal``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    causal: bool
    scale: float
    cap: float = 0.0
    window: Window | None = None

    @property
    def repeat(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]


@dataclass(frozen=True)
class Kernel:
    """How blocks are computed.

    ``attend(block) -> (out [b, heads, s, d], lse fp32 [b, heads, s])``;
    ``gradients(block, grad_out, out, lse) -> (d query, d key, d value)`` in the shapes of the block's tensors, where
    ``out`` and ``lse`` are those of the whole attention.
    """

    attend: Callable[[Block], Pair]
    gradients: Callable[[Block, torch.Tensor, torch.Tensor, torch.Tensor], Triple]


def kernel_for(query: torch.Tensor, rules: Rules) -> Kernel:
    """The fastest kernel for a tensor's device and type."""
    if not rules.is_plain:
        return TILES
    if query.device.type == "cpu":
        return CPU_FLASH
    if query.device.type != "cuda" or query.dtype == torch.float64:
        return TILES
    return CUDA_EFFICIENT if query.dtype == torch.float32 else CUDA_FLASH


def merge(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Add a block to what was computed before, in place: ``out`` fp32 ``[..., s, d]`` and its ``lse [..., s]``.

    With ``w = exp(lse_i - logaddexp(lse_1, lse_2))`` the softmax over both blocks' keys is ``w_1 out_1 + w_2 out_2``
    (Rabe and Staats 2021, arXiv:2112.05682, section 2). Rows that have seen nothing yet hold ``lse = -inf``.
    """
    total = torch.logaddexp(lse, block_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1))
    out.add_(block_out * (block_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _tiles(block: Block) -> list[tuple[slice, slice]]:
    """The tiles of queries, each with the keys that it sees."""
    tokens, keys = block.query.shape[2], block.key.shape[2]
    starts = range(0, tokens, TILE_TOKENS)
    tiles = [(start, min(start + TILE_TOKENS, tokens)) for start in starts]
    if block.window is not None:
        return [(slice(*tile), slice(*block.window.keys_of(*tile))) for tile in tiles]
    return [(slice(*tile), slice(0, tile[1] if block.causal else keys)) for tile in tiles]


def _by_group(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """``[b, heads, s, d] -> [b, groups, heads/groups * s, d]``: one matrix product serves a group's queries."""
    return heads.reshape(heads.shape[0], groups, -1, heads.shape[3])


def _scores(block: Block, tile: slice, seen: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores of a tile, fp32 or wider ``[b, groups, repeat * tile, seen]``, and their slope where they are capped."""
    rows = _by_group(block.query[:, :, tile], block.key.shape[1])
    wide, slope = _wide(rows), None
    scores = (rows.to(wide) @ block.key[:, :, seen].to(wide).mT).mul_(block.scale)
    if block.cap:
        scores = scores.div_(block.cap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(block.cap)
    tokens = tile.stop - tile.start
    if block.window is not None:
        hidden = block.window.hidden(tile, seen, rows.device)
        scores.unflatten(2, (block.repeat, tokens)).masked_fill_(hidden, -torch.inf)
    elif block.causal:
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=rows.device).triu_(1)
        scores[..., -tokens:].unflatten(2, (block.repeat, tokens)).masked_fill_(hidden, -torch.inf)
    return scores, slope


def _tile_attend(block: Block) -> Pair:
    query, groups = block.query, block.key.shape[1]
    wide = _wide(query)
    out = torch.empty_like(query, dtype=wide)
    lse = query.new_empty(query.shape[:3], dtype=wide)
    for tile, seen in _tiles(block):
        scores, _ = _scores(block, tile, seen)
        total = torch.logsumexp(scores, dim=-1)
        found = total.masked_fill(total == -torch.inf, 0)  # of a row that sees no key
        chances = scores.sub_(found.unsqueeze(-1)).exp_()
        rows = chances.to(query.dtype) @ block.value[:, :, seen]
        out[:, :, tile] = rows.view(*query.shape[:2], tile.stop - tile.start, -1)
        lse[:, :, tile] = total.view(query.shape[0], groups * block.repeat, -1)
    return out, lse


def _tile_gradients(block: Block, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Triple:
    query, key, value = block.query, block.key, block.value
    groups, wide = key.shape[1], _wide(query)
    along = (grad_out.to(wide) * out.to(wide)).sum(dim=-1)
    grad_query = torch.empty_like(query, dtype=wide)
    grad_key, grad_value = (torch.zeros_like(each, dtype=wide) for each in (key, value))
    for tile, seen in _tiles(block):
        rows, grad_rows = (_by_group(each[:, :, tile], groups) for each in (query, grad_out))
        of_row = (each[:, :, tile].reshape(*rows.shape[:3], 1) for each in (lse, along))
        total, inner = of_row
        scores, slope = _scores(block, tile, seen)
        chances = scores.sub_(total).exp_()
        grad_value[:, :, seen] += chances.to(value.dtype).mT @ grad_rows
        grad_scores = (grad_rows.to(wide) @ value[:, :, seen].to(wide).mT).sub_(inner).mul_(chances)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_scores = grad_scores.mul_(block.scale).to(key.dtype)
        part = grad_scores @ key[:, :, seen]
        grad_query[:, :, tile] = part.view(*query.shape[:2], tile.stop - tile.start, -1)
        grad_key[:, :, seen] += grad_scores.mT @ rows
    return grad_query, grad_key, grad_value


def _repeated(block: Block) -> Pair:
    """Keys and values with one head per query head."""
    key, value = (each.repeat_interleave(block.repeat, dim=1) for each in (block.key, block.value))
    return key, value


def _summed(grads: Triple, block: Block) -> Triple:
    """Add up the gradients of repeated heads, in fp32."""
    query, key, value = grads
    key, value = (each.float().unflatten(1, (-1, block.repeat)).sum(dim=2) for each in (key, value))
    return query, key, value


def _cpu_flash_attend(block: Block) -> Pair:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        block.query, *_repeated(block), 0.0, block.causal, scale=block.scale
    )
    return out, lse


def _cpu_flash_gradients(block: Block, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Triple:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, block.query, *_repeated(block), out, lse, 0.0, block.causal, scale=block.scale
    )
    return _summed(grads, block)


def _cuda_flash_attend(block: Block) -> Pair:
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        block.query, *_repeated(block), 0.0, block.causal, scale=block.scale
    )
    return found[0], found[1]


def _no_dropout(block: Block) -> Pair:
    """The state of a dropout generator that is never asked."""
    nothing = torch.zeros((), dtype=torch.int64, device=block.query.device)
    return nothing, nothing


def _cuda_flash_gradients(block: Block, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Triple:
    tokens = (block.query.shape[2], block.key.shape[2])
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(grad_out, block.query, *_repeated(block), out, lse, None, None, *tokens, 0.0, block.causal),
        *_no_dropout(block),
        scale=block.scale,
    )
    return _summed(grads, block)


def _cuda_efficient_attend(block: Block) -> Pair:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        block.query, *_repeated(block), None, True, 0.0, block.causal, scale=block.scale
    )
    return out, lse[..., : block.query.shape[2]]  # the kernel pads it to a multiple of 32


def _cuda_efficient_gradients(block: Block, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Triple:
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *(grad_out, block.query, *_repeated(block), None, out, padded, *_no_dropout(block), 0.0),
        [True, True, True, False],
        block.causal,
        scale=block.scale,
    )
    return _summed(grads[:3], block)


TILES = Kernel(_tile_attend, _tile_gradients)
CPU_FLASH = Kernel(_cpu_flash_attend, _cpu_flash_gradients)
CUDA_FLASH = Kernel(_cuda_flash_attend, _cuda_flash_gradients)
CUDA_EFFICIENT = Kernel(_cuda_efficient_attend, _cuda_efficient_gradients)
