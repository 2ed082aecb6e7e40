"""Fused passes equal their plain definitions: values and gradients, in fp64 to rounding, over even and odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from parallel import fused
from parallel.fused_attention import TILE_TOKENS, causal_attention

Definition = Callable[..., torch.Tensor]
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def values(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Normal tensors that want gradients, the same for the same shapes."""
    generator = torch.Generator().manual_seed(sum(sum(shape) for shape in shapes))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def assert_same(fast: Definition, plain: Definition, inputs: list[torch.Tensor]) -> None:
    """Both give the same value and, for one random cotangent, the same gradients, in relative Frobenius norm."""
    found, expected = fast(*inputs), plain(*(each.double() for each in inputs))
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learned = [each for each in inputs if each.requires_grad]
    ours = torch.autograd.grad(found, learned, cotangent.to(found.dtype))
    theirs = torch.autograd.grad(expected, learned, cotangent)
    for one, other in zip((found, *ours), (expected, *theirs), strict=True):
        distance = torch.linalg.vector_norm(one.double() - other.double())
        assert distance <= CLOSE[inputs[0].dtype] * torch.linalg.vector_norm(other.double())


def plain_norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5) * weight


def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def plain_attention(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotation by a complex number, keys and values repeated, torch's attention."""
    tokens, batch, _, slots, width = heads.shape
    first, second = heads[..., :-1, :].chunk(2, dim=-1)
    turned = (
        torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).chunk(2, 1)[0][:, None, None, None]
    )
    rotated = torch.cat([turned.real, turned.imag], dim=-1).permute(1, 2, 3, 0, 4)
    query = rotated[:, :, :-1].reshape(batch, -1, tokens, width)
    key = rotated[:, :, -1].repeat_interleave(slots - 2, dim=1)
    value = heads[..., -1, :].permute(1, 2, 0, 3).repeat_interleave(slots - 2, dim=1)
    out = scaled_dot_product_attention(query, key, value, is_causal=True)
    return out.permute(2, 0, 1, 3).reshape(tokens, batch, -1)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(3, 2, 48), (1, 1, 7), (5, 576)])
def test_norm_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_same(lambda x, w: fused.rms_norm(x, w, 1e-5), plain_norm, values(shape, shape[-1:], dtype=dtype))


def test_norm_of_zeros_has_a_finite_gradient() -> None:
    hidden = torch.zeros(2, 8, requires_grad=True)
    fused.rms_norm(hidden, torch.ones(8), 1e-5).sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(3, 2, 96), (1, 1, 2), (7, 34)])
def test_swiglu_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_same(fused.swiglu, plain_swiglu, values(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(6, 2, 48, 96, 4), (1, 1, 5, 7, 3), (3, 5, 33, 17, 48)])
def test_lora_linear_is_the_definition(sizes: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    tokens, batch, width, out, rank = sizes
    hidden, weight, down, up, added = values(
        (tokens, batch, width), (out, width), (rank, width), (out, rank), (out,), dtype=dtype
    )
    weight, added = weight.detach(), added.detach() if bias else torch.zeros(out, dtype=dtype)

    def plain(hidden: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return hidden @ weight.double().t() + added.double() + hidden @ down.t() @ up.t()

    def fast(hidden: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return fused.lora_linear(hidden, weight, added if bias else None, down, up)

    assert_same(fast, plain, [hidden, down, up])


def test_lora_linear_makes_no_gradient_that_nothing_needs() -> None:
    hidden, weight, down, up = values((2, 3), (4, 3), (1, 3), (4, 1))
    out = fused.lora_linear(hidden.detach(), weight.detach(), None, down, up)
    out.sum().backward()
    assert hidden.grad is None and weight.grad is None and down.grad is not None and up.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7, TILE_TOKENS, TILE_TOKENS + 1, 2 * TILE_TOKENS + 37])
def test_attention_is_the_definition(tokens: int, queries: int, dtype: torch.dtype) -> None:
    (heads,) = values((tokens, 2, 2, queries + 2, 8), dtype=dtype)
    angles = (
        torch.arange(tokens).double()[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01] * 2, dtype=torch.float64)
    ).float()
    if dtype == torch.float64:
        angles = angles.double()
    assert_same(
        lambda each: causal_attention(each, angles), lambda each: plain_attention(each, angles.double()), [heads]
    )


def test_attention_never_looks_ahead() -> None:
    (heads,) = values((TILE_TOKENS + 9, 1, 1, 3, 4))
    changed = heads.detach().clone()
    changed[TILE_TOKENS + 3 :] += 1
    angles = torch.zeros(len(heads), 4, dtype=torch.float64)
    before, after = causal_attention(heads, angles), causal_attention(changed, angles)
    assert torch.equal(before[: TILE_TOKENS + 3], after[: TILE_TOKENS + 3])
    assert not torch.equal(before[TILE_TOKENS + 3 :], after[TILE_TOKENS + 3 :])


@pytest.mark.parametrize("shape", [(0, 4, 3), (1, 1, 1), (9, 5, 7)])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_is_a_matrix_product(shape: tuple[int, int, int], transposed: bool) -> None:
    rows, inner, columns = shape
    left = torch.randn(rows, inner)
    right = torch.randn(columns, inner).t() if transposed else torch.randn(inner, columns)
    torch.testing.assert_close(fused.product(left, right), left @ right)
