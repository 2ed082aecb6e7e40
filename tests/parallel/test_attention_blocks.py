"""Blocks of attention: merged they are attention, and every kernel of this host agrees with the plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel import attention_blocks as blocks
from parallel.attention_blocks import Block, Kernel, Rules, merge
from tests.helpers.attention import Case, whole_results

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# name: kernel, and its 16-bit type (None: it computes in fp32)
KERNELS: dict[str, tuple[Kernel, torch.dtype | None]] = {"tiles": (blocks.TILES, None)}
KERNELS |= (
    {"flash": (blocks.CUDA_FLASH, torch.bfloat16), "efficient": (blocks.CUDA_EFFICIENT, None)}
    if CUDA
    else {"cpu-flash": (blocks.CPU_FLASH, None)}
)


def drawn(queries: int, keys: int, causal: bool, heads: int = 6, groups: int = 2) -> tuple[Block, torch.Tensor]:
    """A block and a gradient of its output."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((heads, queries), (groups, keys), (groups, keys), (heads, queries))
    query, key, value, grad = (torch.randn(2, *shape, 16, generator=generator).to(DEVICE) for shape in shapes)
    return Block(query, key, value, causal, 0.3), grad


def cast(block: Block, dtype: torch.dtype) -> Block:
    return replace(block, query=block.query.to(dtype), key=block.key.to(dtype), value=block.value.to(dtype))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("queries", "keys", "causal"), [(2, 2, True), (9, 9, True), (300, 300, True), (7, 150, False)])
def test_every_kernel_agrees_with_plain_products_in_double_precision(
    name: str, queries: int, keys: int, causal: bool
) -> None:
    kernel, half = KERNELS[name]
    block, grad = drawn(queries, keys, causal)
    wide = cast(block, torch.float64)
    expected = blocks.TILES.attend(wide)
    expected_grads = blocks.TILES.gradients(wide, grad.double(), *expected)
    if half is not None:
        block, grad = cast(block, half), grad.to(half)
    out, lse = kernel.attend(block)
    assert lse.dtype == torch.float32 and lse.shape == block.query.shape[:3]
    found = kernel.gradients(block, grad, out.to(block.query.dtype), lse)
    for one, other in zip((out, lse, *found), (*expected, *expected_grads), strict=True):
        error = torch.linalg.vector_norm(one.double() - other)
        assert error <= (1e-5 if half is None else 2e-2) * torch.linalg.vector_norm(other)


def test_plain_products_are_attention_and_its_gradients() -> None:
    """Against autograd through the definition."""
    case = Case(heads=6, groups=2, tokens=150)
    query, key, value, grad = (each.permute(1, 2, 0, 3) for each in case.inputs())
    block = Block(query, key, value, True, case.width**-0.5)
    out, lse = blocks.TILES.attend(block)
    found = (out, *blocks.TILES.gradients(block, grad, out, lse))
    for one, other in zip(found, whole_results(case), strict=True):
        assert torch.linalg.vector_norm(one.permute(2, 0, 1, 3) - other) <= 1e-5 * torch.linalg.vector_norm(other)


def test_merged_blocks_are_the_attention_to_all_their_keys() -> None:
    block, grad = drawn(10, 24, causal=False)
    out, lse = blocks.TILES.attend(block)
    expected, expected_lse = out.clone(), lse.clone()
    cuts = (slice(0, 5), slice(5, 6), slice(6, 24))
    parts = [Block(block.query, block.key[:, :, cut], block.value[:, :, cut], False, 0.3) for cut in cuts]
    out, lse = blocks.TILES.attend(parts[0])
    for part in parts[1:]:
        merge(out, lse, *blocks.TILES.attend(part))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    whole = blocks.TILES.gradients(block, grad, out, lse)
    shares = [blocks.TILES.gradients(part, grad, out, lse) for part in parts]
    torch.testing.assert_close(torch.stack([share[0] for share in shares]).sum(0), whole[0])
    for index in (1, 2):
        torch.testing.assert_close(torch.cat([share[index] for share in shares], dim=2), whole[index])


def test_rows_that_have_seen_nothing_take_what_comes_first() -> None:
    block, _ = drawn(4, 4, causal=False)
    out, lse = torch.zeros(2, 6, 4, 16, device=DEVICE), torch.full((2, 6, 4), -torch.inf, device=DEVICE)
    part = blocks.TILES.attend(block)
    merge(out, lse, *part)
    torch.testing.assert_close((out, lse), part)


@pytest.mark.parametrize(
    ("device", "dtype", "kernel"),
    [
        ("cpu", torch.float32, blocks.CPU_FLASH),
        ("cpu", torch.bfloat16, blocks.CPU_FLASH),
        ("cuda", torch.bfloat16, blocks.CUDA_FLASH),
        ("cuda", torch.float32, blocks.CUDA_EFFICIENT),
        ("cuda", torch.float64, blocks.TILES),
        ("meta", torch.float32, blocks.TILES),
    ],
)
def test_the_kernel_follows_device_and_type(device: str, dtype: torch.dtype, kernel: Kernel) -> None:
    class Query:
        pass

    query = Query()
    query.device, query.dtype = torch.device(device), dtype  # type: ignore[attr-defined]
    assert blocks.kernel_for(query, Rules(1.0)) is kernel  # type: ignore[arg-type]
    assert blocks.kernel_for(query, Rules(1.0, cap=2.0)) is blocks.TILES  # type: ignore[arg-type]
    assert blocks.kernel_for(query, Rules(1.0, window=2)) is blocks.TILES  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [blocks.CUDA_FLASH, blocks.CUDA_EFFICIENT], ids=["flash", "efficient"])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(64, 64, True), (40, 80, False)])
def test_cuda_operators_take_what_they_are_given(kernel: Kernel, queries: int, keys: int, causal: bool) -> None:
    """Without a GPU only shapes can be seen, but a private operator whose signature changed shows here."""
    shapes = ((6, queries), (2, keys), (2, keys))
    query, key, value = (torch.empty(2, *shape, 16, device="meta", dtype=torch.bfloat16) for shape in shapes)
    block = Block(query, key, value, causal, 0.3)
    out, lse = kernel.attend(block)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, query.shape[:3], torch.float32)
    grads = kernel.gradients(block, torch.empty_like(out), out, lse)
    assert [each.shape for each in grads] == [query.shape, key.shape, value.shape]
