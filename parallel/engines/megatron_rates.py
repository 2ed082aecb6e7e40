"""Which weights of a megatron-core model learn, and at which learning rate: groups of its optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from parallel.engine import EngineSpec
from parallel.lora import LoraPart
from parallel.lora_spec import LoraSpec
from parallel.shards import Piece

_MARK = "lr_ratio"  # on a parameter: its learning rate in units of the run's


def set_apart(spec: EngineSpec, tensors: Iterable[tuple[torch.Tensor, Piece]]) -> None:
    """Freeze a full model's frozen weights, and mark those with a learning rate of their own."""
    for tensor, piece in tensors:
        if piece.name in spec.frozen:
            tensor.requires_grad_(False)
        if piece.name in spec.lr_ratios:
            setattr(tensor, _MARK, spec.lr_ratios[piece.name])


def set_adapters_apart(lora: LoraSpec, module: torch.nn.Module, base: Iterable[tuple[torch.Tensor, Piece]]) -> None:
    """Let whole weights learn that are saved with the adapter, and mark what LoRA+ gives another learning rate.

    That is B and, as in PEFT, what has one dimension (DoRA's magnitudes, norms).
    """
    for tensor, piece in base:
        if piece.name in lora.saved:
            tensor.requires_grad_(True)
            if tensor.dim() == 1:
                setattr(tensor, _MARK, lora.lr_ratio)
    if lora.lr_ratio == 1.0:
        return
    for part in module.modules():
        if isinstance(part, LoraPart):
            for parameter in (part.B, part.magnitude):
                if parameter is not None:
                    setattr(parameter, _MARK, lora.lr_ratio)


def overrides(config: OptimizerConfig, chunks: Iterable[torch.nn.Module]) -> dict[ParamKey, Any]:
    """megatron-core's table of parameter groups: its own, and one with ``lr_mult`` for each ratio on this rank."""
    table = get_standard_config_overrides(config)
    ratios = {getattr(parameter, _MARK, 1.0) for chunk in chunks for parameter in chunk.parameters()}
    for ratio in sorted(ratios - {1.0}):
        table[ParamKey(with_name_predicate=_has(ratio))] = {"lr_mult": ratio}
    return table


def _has(ratio: float) -> ParamWithNamePredicate:
    return ParamWithNamePredicate(f"lr_ratio={ratio}", lambda parameter, _: getattr(parameter, _MARK, 1.0) == ratio)
