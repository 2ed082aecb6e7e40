"""NF4 is bitsandbytes' (0.50.2; its values lie in tests/golden, see write_nf4.py), and cuts do not change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel import nf4

GOLDEN = Path(__file__).parents[1] / "golden" / "nf4.safetensors"
BACKENDS = [nf4.dequantise_by_torch, nf4.dequantise]  # the second is bitsandbytes where that is installed


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_codes_are_those_of_bitsandbytes(golden: dict[str, torch.Tensor], name: str) -> None:
    """Scales go to the nearest of 256 numbers; its CPU kernel takes the other one within 1.5e-5 of the middle."""
    codes, scales = nf4.quantise(golden[f"{name}.weight"])
    packed = nf4.quantise_scales(scales)
    assert torch.equal(codes, golden[f"{name}.codes"])
    table = nf4.dynamic_table()
    assert torch.equal(table, golden[f"{name}.table"])
    assert torch.allclose(packed.outer, golden[f"{name}.outer"], rtol=1e-6)
    assert torch.allclose(packed.mean, golden[f"{name}.mean"], rtol=1e-6)
    outer = packed.outer.repeat_interleave(nf4.OUTER_BLOCK)[: scales.numel()].view(scales.shape)
    unit = (scales - packed.mean) / outer
    theirs, ours = (table[each.int()] for each in (golden[f"{name}.scale_codes"], packed.codes))
    assert ((unit - theirs).abs() - (unit - ours).abs()).max() <= 3e-5
    assert (theirs != ours).sum() <= 2  # of 480


@pytest.mark.parametrize("dequantise", BACKENDS)
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_dequantised_values_are_those_of_bitsandbytes(
    golden: dict[str, torch.Tensor], name: str, dequantise: Callable[..., torch.Tensor]
) -> None:
    expected, weight = golden[f"{name}.dequantised"], golden[f"{name}.weight"].float()
    packed = nf4.Scales(*(golden[f"{name}.{key}"] for key in ("scale_codes", "outer", "mean")))
    found = dequantise(golden[f"{name}.codes"], nf4.restore_scales(packed), expected.dtype)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 1e-6
    assert 0.01 < torch.linalg.vector_norm(found.float() - weight) / torch.linalg.vector_norm(weight) < 0.2  # 4 bits


@pytest.mark.parametrize("rows", [slice(0, 32), slice(64, 96)])
@pytest.mark.parametrize("columns", [slice(0, 64), slice(128, 320)])
def test_a_shard_has_the_codes_of_the_whole(golden: dict[str, torch.Tensor], rows: slice, columns: slice) -> None:
    weight = golden["fp32.weight"]
    codes, scales = nf4.quantise(weight)
    here, scales_here = nf4.quantise(weight[rows, columns])
    assert torch.equal(here, codes[rows, columns.start // 2 : columns.stop // 2])
    assert torch.equal(scales_here, scales[rows, columns.start // 64 : columns.stop // 64])


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="NF4 needs rows of whole blocks of 64, not of 96 elements"):
        nf4.quantise(torch.zeros(2, 96))
