"""GaLore's arithmetic is its reference's (galore-torch 1.0; its values lie in tests/golden, see write_galore.py)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.galore import AdamStep, normed, subspace
from parallel.galore_spec import PROJECTIONS, GaloreSpec
from tests.golden import write_galore as reference

GOLDEN = Path(__file__).parents[1] / "golden" / "galore.safetensors"


@pytest.mark.parametrize(("name", "projection"), itertools.product(reference.SHAPES, PROJECTIONS))
def test_weights_move_as_the_references_do(name: str, projection: str) -> None:
    golden = load_file(GOLDEN)
    spec = GaloreSpec(reference.RANK, reference.UPDATE_STEPS, reference.SCALE, projection)
    weight = golden[f"{name}.weight"]
    sideways = spec.axis(tuple(weight.shape)) == 1  # type: ignore[arg-type]
    _, shape = spec.shapes(tuple(weight.shape))  # type: ignore[arg-type]
    moments = torch.zeros(shape), torch.zeros(shape)
    for step, gradient in enumerate(golden[f"{name}.gradients"]):
        turned = gradient.t() if sideways else gradient
        if step % spec.update_steps == 0:
            projector = subspace(turned, spec.rank)
        low = projector.t() @ turned
        change = projector @ normed(low, *moments, AdamStep(step + 1, (0.9, 0.999), reference.EPS))
        weight = weight - reference.LR * spec.scale * (change.t() if sideways else change)
    expected = golden[f"{name}.{projection}"]
    moved = torch.linalg.vector_norm(expected - golden[f"{name}.weight"])
    assert torch.linalg.vector_norm(weight - expected) < 1e-4 * moved


def test_a_subspace_is_orthonormal_and_has_no_open_sign() -> None:
    gradient = torch.randn(12, 40, generator=torch.Generator().manual_seed(2))
    basis = subspace(gradient, 5)
    assert torch.allclose(basis.t() @ basis, torch.eye(5), atol=1e-5)
    assert torch.allclose(subspace(-gradient, 5), basis, atol=1e-4)
    assert basis.is_contiguous()  # ranks give it to each other as it lies in memory
    best = torch.linalg.svdvals(gradient)[:5].square().sum()  # no other five directions hold more of it
    assert (basis.t() @ gradient).square().sum() == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16), (3000, 9), (5, 1)])
def test_a_subspace_is_that_of_a_decomposition_in_fp64(shape: tuple[int, int]) -> None:
    """Of either side, whichever is the shorter one; in fp32 this would be 1e-6 off and more."""
    gradient = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    rank = min(4, *shape)
    left = torch.linalg.svd(gradient.double(), full_matrices=False)[0][:, :rank]
    basis = subspace(gradient, rank).double()
    assert torch.linalg.vector_norm(basis - left * (left * basis).sum(0).sign()) < 2e-7


def test_rounding_turns_directions_by_no_more_than_its_own_size_over_the_gap() -> None:
    """Two singular values 1e-3 apart. A decomposition in fp32 turns them by 1e-4 whatever the gradient's rounding."""
    generator = torch.Generator().manual_seed(4)
    sides = [torch.linalg.qr(torch.randn(size, 6, generator=generator).double())[0] for size in (32, 64)]
    values = torch.tensor([1.0, 0.8, 0.799, 0.6, 0.5, 0.4], dtype=torch.float64)
    exact = (sides[0] * values) @ sides[1].t()
    gradient = exact.float()
    noise = torch.randn(gradient.shape, generator=generator)
    perturbed = gradient + noise * (1e-7 * gradient.norm() / noise.norm())
    first, second = subspace(gradient, 4), subspace(perturbed, 4)
    turned = torch.linalg.vector_norm(first - second)
    assert turned < 1e-7 * gradient.norm() / 1e-3  # Davis and Kahan's bound, of noise in all directions
    moments = (first.t() @ gradient).square(), (second.t() @ perturbed).square()
    assert torch.linalg.vector_norm(moments[0] - moments[1]) < 1e-5 * torch.linalg.vector_norm(moments[0])
    left = torch.linalg.svd(gradient)[0][:, :4]
    assert torch.linalg.vector_norm(left * (left * first).sum(0).sign() - first) < 1e-3  # the same directions


def test_directions_of_rounding_are_left_out() -> None:
    """Of a gradient of rank 2 the third direction is noise, which Adam would make as large as the others."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(12, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    assert subspace(gradient, 4).norm(dim=0).round(decimals=4).tolist() == [1, 1, 0, 0]
    assert not subspace(torch.zeros(3, 4), 2).any()
    gradient[0, 0] = float("nan")
    assert subspace(gradient, 4).isnan().all()
