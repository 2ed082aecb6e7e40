"""Writes tests/golden/galore.safetensors: what GaLore's reference (pip install galore-torch==1.0) makes of matrices.

python tests/golden/write_galore.py

A decomposition leaves signs open, and moments outlive their directions: so the reference's directions are turned as
ours are. Its eps stands elsewhere in Adam's formula (before the bias is corrected); it is too small to matter here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"wide": (12, 40), "tall": (40, 12), "square": (16, 16)}
PROJECTIONS = ("std", "reverse_std", "left", "right")
RANK, UPDATE_STEPS, SCALE, STEPS, LR, EPS = 4, 3, 0.25, 8, 0.01, 1e-20


def main() -> None:
    """Every shape with every projection, over the same gradients."""
    from galore_torch import GaLoreAdamW  # not among the project's dependencies
    from galore_torch.galore_projector import GaLoreProjector

    decompose = GaLoreProjector.get_orthogonal_matrix

    def turned(self: object, weights: torch.Tensor, rank: int, type: str) -> torch.Tensor:
        found = decompose(self, weights, rank, type)
        rows = found if type == "right" else found.t()
        along = rows @ torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype)
        rows = rows * along.sign()[:, None]
        return rows if type == "right" else rows.t()

    GaLoreProjector.get_orthogonal_matrix = turned
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, shape in SHAPES.items():
        found[f"{name}.weight"] = start = torch.randn(shape, generator=generator)
        found[f"{name}.gradients"] = gradients = torch.randn(STEPS, *shape, generator=generator)
        for projection in PROJECTIONS:
            weight = torch.nn.Parameter(start.clone())
            settings = {"rank": RANK, "update_proj_gap": UPDATE_STEPS, "scale": SCALE, "proj_type": projection}
            optimizer = GaLoreAdamW(
                [{"params": [weight], **settings}], lr=LR, eps=EPS, weight_decay=0.0, no_deprecation_warning=True
            )
            for gradient in gradients:
                weight.grad = gradient.clone()
                optimizer.step()
            found[f"{name}.{projection}"] = weight.detach()
    save_file({key: value.contiguous() for key, value in found.items()}, Path(__file__).with_name("galore.safetensors"))


if __name__ == "__main__":
    main()
