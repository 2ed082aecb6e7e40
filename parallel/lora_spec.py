"""What a LoRA adapter is, as a value: no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LoraSpec:
    """``targets``: full module paths such as ``model.layers.0.self_attn.q_proj`` (``parallel.names.resolve_targets``).

    ``scale`` is ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). ``dora``:
    each output row's length is a parameter of its own (:mod:`parallel.dora`). ``lr_ratio``: the learning rate of B and
    of DoRA's magnitudes in units of A's (LoRA+, Hayou et al. 2024, arXiv:2402.12354). ``init``: ``default`` (A random,
    B zero) or ``pissa`` (:mod:`parallel.pissa`). ``saved``: names of weights that learn whole beside the adapter.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    targets: frozenset[str] = frozenset()
    dora: bool = False
    lr_ratio: float = 1.0
    init: str = "default"
    saved: frozenset[str] = frozenset()

    @property
    def scale(self) -> float:
        """What ``B A x`` is multiplied with.

        Example:
            >>> LoraSpec(r=16, alpha=32).scale, LoraSpec(r=16, alpha=32, rslora=True).scale
            (2.0, 8.0)
        """
        return self.alpha / math.sqrt(self.r) if self.rslora else self.alpha / self.r
