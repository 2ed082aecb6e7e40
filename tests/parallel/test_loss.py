"""The blockwise loss is torch's cross entropy: value and both gradients, whatever the block and the padding."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from parallel import loss as losses
from parallel.engine import IGNORED_LABEL
from parallel.loss import HeadAdapter, VocabShard, head_logits, summed_loss
from tests.helpers.pool import Pool

VOCAB, HIDDEN, ROWS = 53, 12, 21


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states ``[7, 3, hidden]``, an output layer and labels, some of them missing."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(7, 3, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (7, 3), generator=generator)
    labels[2, :2] = IGNORED_LABEL
    return hidden, weight, labels


def oracle(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cap: float = 0.0) -> list[torch.Tensor]:
    """Loss, gradient of hidden states, gradient of the output layer, in fp64."""
    wide, matrix = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (wide @ matrix.t()).flatten(0, -2)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    total = cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return [total.detach(), *torch.autograd.grad(total * 0.5, [wide, matrix])]


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    distance = torch.linalg.vector_norm(found.detach().double() - expected)
    assert distance <= tolerance * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("block_rows", [1, 4, ROWS, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_equals_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", block_rows * VOCAB)
    hidden, weight, labels = problem(dtype)
    total, count = summed_loss(hidden, weight, labels, VocabShard(0, VOCAB))
    (total * 0.5).backward()
    assert count == ROWS - 2
    for found, expected in zip((total, hidden.grad, weight.grad), oracle(hidden, weight, labels), strict=True):
        assert found is not None
        assert_near(found, expected, tolerance)


def adapter_of(kind: str) -> HeadAdapter:
    """An adapter of rank 3 on the output layer of :func:`problem`, with what PEFT has in its place."""
    generator = torch.Generator().manual_seed(6)
    low, up, dropped = (torch.randn(*size, generator=generator) for size in ((7, 3, 3), (VOCAB, 3), (7, 3, HIDDEN)))
    factor = torch.rand(VOCAB, generator=generator) + 0.5
    made = HeadAdapter(low, up, factor if "dora" in kind else None, dropped if "dropout" in kind else None)
    for each in (made.low, made.up, made.factor, made.dropped):
        if each is not None:
            each.requires_grad_()
    return made


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("block_rows", [1, 8, 1000])
@pytest.mark.parametrize("kind", ["lora", "dora", "dora-dropout"])
def test_an_adapter_of_the_output_layer(
    monkeypatch: pytest.MonkeyPatch, kind: str, block_rows: int, cap: float
) -> None:
    """Against autograd in fp64 on the formula of PEFT's DoraLinearLayer: every gradient, whatever the block."""
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", block_rows * VOCAB)
    hidden, weight, labels = problem()
    adapter = adapter_of(kind)
    total, _ = summed_loss(hidden, weight, labels, VocabShard(0, VOCAB), cap, adapter)
    (total * 0.5).backward()
    given = [each for each in (adapter.low, adapter.up, adapter.factor, adapter.dropped) if each is not None]
    x, w, low, up, *rest = (each.detach().double().requires_grad_() for each in (hidden, weight, *given))
    factor = rest[0] if rest else torch.ones(VOCAB, dtype=torch.float64)
    base = (rest[1] if len(rest) > 1 else x) @ w.t()
    logits = (x @ w.t() + (factor - 1) * base + factor * (low @ up.t())).flatten(0, 1)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    assert_near(total, expected.detach(), 1e-6)
    gradients = torch.autograd.grad(expected * 0.5, [x, w, low, up, *rest])
    for found, gradient in zip((hidden, weight, *given), gradients, strict=True):
        assert found.grad is not None
        assert_near(found.grad, gradient, 1e-6)


def test_logits_of_an_adapter_leave_padding_alone() -> None:
    hidden, weight, _ = problem()
    adapter = adapter_of("dora")
    assert adapter.factor is not None
    padded = torch.cat([weight.detach(), torch.full((3, HIDDEN), 9.0)])
    found = head_logits(hidden.detach(), padded, adapter)
    expected = (hidden @ weight.t() + adapter.low @ adapter.up.t()) * adapter.factor
    assert torch.allclose(found[..., :VOCAB], expected, atol=1e-5)
    assert torch.equal(found[..., VOCAB:], hidden.detach() @ padded[VOCAB:].t())


def test_capped_logits() -> None:
    hidden, weight, labels = problem()
    total, _ = summed_loss(hidden, weight, labels, VocabShard(0, VOCAB), cap=3.0)
    (total * 0.5).backward()
    for found, expected in zip((total, hidden.grad, weight.grad), oracle(hidden, weight, labels, 3.0), strict=True):
        assert found is not None
        assert_near(found, expected, 1e-6)


def test_rows_that_pad_the_vocabulary_are_no_entries() -> None:
    hidden, weight, labels = problem()
    padded = torch.cat([weight.detach(), torch.full((3, HIDDEN), 9.0)])
    total, _ = summed_loss(hidden, padded, labels, VocabShard(0, VOCAB))
    assert_near(total, oracle(hidden, weight, labels)[0], 1e-6)


def test_no_label_is_a_loss_of_zero() -> None:
    hidden, weight, labels = problem()
    total, count = summed_loss(hidden, weight, torch.full_like(labels, IGNORED_LABEL), VocabShard(0, VOCAB))
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert hidden.grad is not None and not hidden.grad.any()


def test_far_logits_stay_finite() -> None:
    hidden, weight, labels = problem()
    total, _ = summed_loss(hidden * 300, weight, labels, VocabShard(0, VOCAB))
    assert total.isfinite()
    assert_near(total, oracle(hidden * 300, weight, labels)[0], 1e-5)


def test_learned_rows_keep_the_precision_of_their_gradient() -> None:
    """Where a label's chance is 0.999, the gradient is a thousandth of each of the two terms that it is made of."""
    weight = torch.eye(8).bfloat16()
    hidden = (9 * torch.eye(8)).bfloat16().requires_grad_()
    labels = torch.arange(8)
    total, _ = summed_loss(hidden, weight, labels, VocabShard(0, 8))
    (total * 0.5).backward()
    assert hidden.grad is not None
    assert_near(hidden.grad, oracle(hidden, weight, labels)[1], 5e-3)
    assert total.item() == pytest.approx(oracle(hidden, weight, labels)[0].item(), rel=1e-3)


def share_of_rank() -> tuple[float, list[list[float]], list[list[float]]]:
    """On each rank of a cut vocabulary: the loss, its share of the hidden states' gradient, its rows' gradient."""
    import torch.distributed as dist

    hidden, weight, labels = problem()
    size, rank = dist.get_world_size(), dist.get_rank()
    start, stop = VOCAB * rank // size, VOCAB * (rank + 1) // size
    mine = weight.detach()[start:stop].clone().requires_grad_()
    total, _ = summed_loss(hidden, mine, labels, VocabShard(start, stop - start, dist.group.WORLD))
    (total * 0.5).backward()
    assert hidden.grad is not None and mine.grad is not None
    return total.item(), hidden.grad.flatten(0, 1).tolist(), mine.grad.tolist()


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_cut_vocabulary_changes_nothing(pool: Pool, ranks: int) -> None:
    expected = oracle(*problem())
    found = pool.run(ranks, share_of_rank)
    for total, _, _ in found:
        assert total == pytest.approx(expected[0].item(), rel=1e-6)
    assert_near(sum(torch.tensor(share) for _, share, _ in found), expected[1].flatten(0, 1), 1e-6)  # type: ignore[arg-type]
    assert_near(torch.cat([torch.tensor(rows) for _, _, rows in found]), expected[2], 1e-6)
