"""The base that an adapter of QLoRA was trained on: what NF4 makes of the weights in the base's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.experts import weight_places
from orchestrator.checkpoint.tensor_file import TensorFiles
from parallel.families import read_model
from parallel.names import quantised_weights
from parallel.nf4 import round_trip
from parallel.shards import Box
from parallel.specs import read_hf_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class QuantisedBase:
    """Reads a base's tensors as a run on NF4 had them; one whole weight is held at a time.

    Args:
        about: the manifest's words on the run: ``quantise`` and ``precision``.
    """

    def __init__(self, tensors: TensorFiles, base: Path, about: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._dtype = DTYPES[str(about.get("precision", "fp32"))]
        model = read_model(read_hf_config(base)) if about.get("quantise") == "nf4" else None
        self._names = set(quantised_weights(model)) if model else set()
        self._held: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, box: Box) -> torch.Tensor:
        """One box: as it is stored or, of a linear that was quantised, its dequantised values.

        Args:
            box: of a tensor that holds a layer's experts, whole ones.
        """
        joined = list(weight_places(name, self._tensors.entry(name).shape)) if self._names else []
        if joined:
            return self._read_joined(name, box, [place for _, place in joined])
        if name not in self._names:
            return self._tensors.read(name, box)
        if self._held is None or self._held[0] != name:
            whole = self._tensors.read(name, Box.whole(self._tensors.entry(name).shape))
            self._held = name, round_trip(whole.to(self._dtype))
        return self._held[1][box.slices]

    def _read_joined(self, name: str, box: Box, places: list[Box]) -> torch.Tensor:
        """Some experts of a tensor that holds a layer's: each of their weights was quantised by itself."""
        data = self._tensors.read(name, box).to(self._dtype)
        for place in places:
            if (common := place.intersect(box)) is not None:
                inside = data[common.shift(tuple(-offset for offset in box.offset)).slices]
                inside.copy_(round_trip(inside[0])[None])
        return data
