"""Moments of projected gradients are compared in one basis: rounding is let through, a fault is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from orchestrator.certify.projecting import Kept, apart, carried, turned
from parallel.galore import AdamStep, normed, subspace

BETAS, RANK, EVERY = (0.9, 0.999), 4, 2


def gradients(rounding: float) -> list[torch.Tensor]:
    """Of three steps, two singular values 1e-5 apart in the last; ``rounding``: a relative error of every one."""
    generator, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(7)
    found = []
    for gap in (0.1, 0.1, 1e-5):
        left, right = (torch.linalg.qr(torch.randn(size, 6, generator=generator))[0] for size in (16, 24))
        whole = (left * torch.tensor([1.0, 0.8, 0.8 - gap, 0.5, 0.3, 0.2])) @ right.t()
        error = torch.randn(whole.shape, generator=noise)
        found.append(whole + error * (rounding * whole.norm() / error.norm()))
    return found


def run(given: list[torch.Tensor]) -> tuple[list[Kept], list[torch.Tensor]]:
    """What GaLore keeps after each step, and the projected gradients."""
    moments = torch.zeros(RANK, 24), torch.zeros(RANK, 24)
    kept, lows = [], []
    for step, gradient in enumerate(given):
        if step % EVERY == 0:
            projector = subspace(gradient, RANK)
        lows.append((projector.t() @ gradient).double())
        normed(lows[-1].float(), *moments, AdamStep(step + 1, BETAS, 1e-8))
        kept.append(Kept(projector.double(), *(each.double() for each in moments)))
    return kept, lows


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


def test_rounding_turns_moments_and_is_let_through() -> None:
    (one, lows), (other, _) = run(gradients(0.0)), run(gradients(1e-6))
    assert gap(one[-1].second, other[-1].second) > 5e-4  # five times the tolerance
    moved = carried(one, other, BETAS)[-1]
    assert gap(moved.first, other[-1].first) < 1e-5 and gap(moved.second, other[-1].second) < 1e-5
    assert apart(one[-1].projector, other[-1].projector) < 1e-5
    assert turned(one[-1], other[-1].projector, lows[-1]) < 3e-6


def test_what_is_carried_to_the_same_basis_is_the_same() -> None:
    one, lows = run(gradients(0.0))
    for kept, moved in zip(one, carried(one, one, BETAS), strict=True):
        assert gap(kept.first, moved.first) < 1e-6 and gap(kept.second, moved.second) < 1e-6
    assert apart(one[0].projector, one[0].projector) < 1e-6 and turned(one[0], one[0].projector, lows[0]) < 1e-6


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_wrong_gradient_is_found_beside_a_turn(factor: float) -> None:
    """As of a rank that left a piece of one out: the third step's alone."""
    one, _ = run(gradients(0.0))
    wrong = gradients(1e-6)
    wrong[2] = wrong[2] * factor
    other, _ = run(wrong)
    moved = carried(one, other, BETAS)[-1]
    assert gap(moved.first, other[-1].first) > 1e-4 and gap(moved.second, other[-1].second) > 1e-4


def test_turns_that_are_no_rounding_are_found() -> None:
    one, lows = run(gradients(0.0))
    basis = one[0].projector
    swapped, mirrored = basis[:, [0, 1, 3, 2]], basis * torch.tensor([1.0, 1.0, -1.0, 1.0])
    assert apart(basis, swapped) < 1e-6 and apart(basis, mirrored) < 1e-6  # the subspace is the same
    assert turned(one[0], swapped, lows[0]) > 0.1
    assert turned(one[0], mirrored, lows[0]) == float("inf")
    angle = torch.tensor(1e-2)
    plane = torch.stack([basis[:, 0] * angle.cos() + basis[:, 1] * angle.sin(), -basis[:, 0] * angle.sin()
                         + basis[:, 1] * angle.cos()], dim=1)  # fmt: skip
    assert turned(one[0], torch.cat([plane, basis[:, 2:]], dim=1), lows[0]) > 1e-4
    outside = torch.linalg.qr(torch.randn(16, RANK, generator=torch.Generator().manual_seed(3)))[0].double()
    assert apart(basis, outside) > 0.1


def test_directions_that_are_left_out_are_compared_too() -> None:
    one, lows = run(gradients(0.0))
    fewer = one[0].projector.clone()
    fewer[:, 3] = 0
    assert apart(one[0].projector, fewer) > 0.1
    nothing = replace(one[0], projector=torch.zeros_like(fewer))
    assert apart(nothing.projector, fewer) > 0.1 and turned(nothing, fewer, torch.zeros_like(lows[0])) == 0.0
