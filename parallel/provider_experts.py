"""The router of a mixture of experts: megatron-core's, with room for an adapter."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):
    """Chooses each token's experts. ``adapter``, where there is one, adds to the logits what it makes of the tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: torch.nn.Module | None = None

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., hidden] -> [..., experts]``, in the router's type."""
        logits: torch.Tensor = super().gating(input)
        return logits if self.adapter is None else logits + self.adapter(input).to(logits.dtype)
