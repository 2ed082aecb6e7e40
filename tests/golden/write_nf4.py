"""Writes tests/golden/nf4.safetensors: a weight as bitsandbytes (pip install bitsandbytes==0.50.2) quantises it.

python tests/golden/write_nf4.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    """One weight of rows of very unequal size, a row of zeros among them, and one in bf16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # not among the project's dependencies

    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(96, 320, generator=generator) * torch.linspace(0.001, 2, 96)[:, None]
    weight[7] = 0
    found = {}
    for name, value in (("fp32", weight), ("bf16", weight.bfloat16())):
        codes, state = quantize_4bit(value, blocksize=64, compress_statistics=True, quant_type="nf4")
        found |= {
            f"{name}.weight": value,
            f"{name}.codes": codes.reshape(96, 160),
            f"{name}.scale_codes": state.absmax.reshape(96, 5),
            f"{name}.outer": state.state2.absmax,
            f"{name}.mean": state.offset.reshape(1),
            f"{name}.table": state.state2.code,
            f"{name}.dequantised": dequantize_4bit(codes, state),
        }
    save_file({key: value.contiguous() for key, value in found.items()}, Path(__file__).with_name("nf4.safetensors"))


if __name__ == "__main__":
    main()
