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
    best = torch.linalg.svdvals(gradient)[:5].square().sum()  # no other five directions hold more of it
    assert (basis.t() @ gradient).square().sum() == pytest.approx(float(best), rel=1e-5)


def test_directions_of_rounding_are_left_out() -> None:
    """Of a gradient of rank 2 the third direction is noise, which Adam would make as large as the others."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(12, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    assert subspace(gradient, 4).norm(dim=0).round(decimals=4).tolist() == [1, 1, 0, 0]
    assert not subspace(torch.zeros(3, 4), 2).any()
    gradient[0, 0] = float("nan")
    assert subspace(gradient, 4).isnan().all()
