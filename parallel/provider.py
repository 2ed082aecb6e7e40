"""Which modules megatron-core's layers are built from: ours everywhere, transformer-engine's where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from parallel.attention import SdpaAttention
from parallel.fused import geglu, rms_norm, swiglu
from parallel.fused_attention import RotarySelfAttention
from parallel.provider_experts import Router
from parallel.provider_latent import LatentSelfAttention, LatentSubmodules
from parallel.specs import ModelSpec


class RmsNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    It multiplies with its weight, or with ``1 + weight`` where the config says ``layernorm_zero_centered_gamma``. Its
    weight is replicated over tensor-parallel ranks; with sequence parallelism each rank sees its own tokens only
    and megatron-core sums the gradients.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.centred = bool(config.layernorm_zero_centered_gamma)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``x / rms(x) * weight``."""
        return rms_norm(hidden, self.weight.float() + 1 if self.centred else self.weight, self.eps)


class NormedAdd(torch.nn.Module):
    """What adds a block's output to the residual stream, where the output is normed first (sandwich norms).

    Stands where megatron-core has its bias-dropout-add; there is no dropout on hidden states here.
    """

    def __init__(self, norm: type, config: Any) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """``((out, bias or None), residual, dropout) -> residual + norm(out + bias)``."""

        def add(out_with_bias: Any, residual: torch.Tensor, _: float) -> torch.Tensor:
            out, bias = out_with_bias
            normed: torch.Tensor = self.norm(out if bias is None else out + bias)
            return residual + normed

        return add


class SwiGlu(torch.nn.Module):
    """:func:`parallel.fused.swiglu` where megatron-core takes an activation module: ``[..., 2 ffn] -> [..., ffn]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up``."""
        return swiglu(gate_up)


class GeGlu(SwiGlu):
    """:func:`parallel.fused.geglu` in the same place."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``gelu(gate) * up``."""
        return geglu(gate_up)


class IsotrainSpecProvider(BackendSpecProvider):
    """Norm, linears and attention that need nothing but torch."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        return None

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        return RmsNorm

    def core_attention(self) -> type:
        return SdpaAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool) -> tuple[type, Any]:
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def activation_func(self) -> type | None:
        return SwiGlu


class TransformerEngineSpecProvider(IsotrainSpecProvider):
    """Ours, with transformer-engine's attention and norm: the fast path where it is installed.

    ``own_attention``: keep ours, where transformer-engine's would refuse.
    """

    def __init__(self, own_attention: bool = False) -> None:
        self._own_attention = own_attention

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm

    def core_attention(self) -> type:
        if self._own_attention:
            return SdpaAttention
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention


def provider(config: Any, device: str, plain_scores: bool = True) -> IsotrainSpecProvider:
    """The best provider for a model's ``TransformerConfig`` and a device on this host.

    transformer-engine's all-to-all wants key/value heads that the context-parallel ranks divide; ours sends them twice.
    Its kernels know no caps on scores, so that models with caps or windows (not ``plain_scores``) keep our attention.
    """
    if device == "cuda" and find_spec("transformer_engine") is not None:
        groups = config.num_query_groups // config.tensor_model_parallel_size
        uneven = config.cp_comm_type == "a2a" and groups % config.context_parallel_size != 0
        return TransformerEngineSpecProvider(own_attention=uneven or not plain_scores)
    return IsotrainSpecProvider()


def block_spec(spec: ModelSpec, layers: Sequence[int], config: Any, device: str) -> TransformerBlockSubmodules:
    """The transformer block of one pipeline chunk with these layers of the model, counted from 0."""
    backend = provider(config, device, plain_scores=not spec.windows and not spec.score_cap)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(spec, layer, backend, config) for layer in layers], layer_norm=backend.layer_norm()
    )


def _layer_spec(spec: ModelSpec, layer: int, backend: IsotrainSpecProvider, config: Any) -> ModuleSpec:
    add = get_bias_dropout_add
    if spec.sandwich_norms:
        add = ModuleSpec(module=NormedAdd, params={"norm": backend.layer_norm(), "config": config})
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(),
            self_attention=_latent_spec(spec, backend) if spec.latent else _attention_spec(spec, layer, backend),
            self_attn_bda=add,
            pre_mlp_layernorm=backend.layer_norm(),
            mlp=_mlp_spec(spec, layer, backend),
            mlp_bda=add,
        ),
    )


def _attention_spec(spec: ModelSpec, layer: int, backend: IsotrainSpecProvider) -> ModuleSpec:
    window = spec.window(layer)
    qk_norm = backend.layer_norm(for_qk=True) if spec.qk_norm else IdentityOp
    return ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rope_theta": spec.local_rope_theta if window else 0.0},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=_core_attention(spec, window, backend),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _latent_spec(spec: ModelSpec, backend: IsotrainSpecProvider) -> ModuleSpec:
    return ModuleSpec(
        module=LatentSelfAttention,
        params={"spec": spec},
        submodules=LatentSubmodules(
            column=backend.column_parallel_linear(),
            row=backend.row_parallel_linear(),
            norm=backend.layer_norm(),
            core_attention=SdpaAttention,
        ),
    )


def _core_attention(spec: ModelSpec, window: int, backend: IsotrainSpecProvider) -> ModuleSpec | type:
    if not window and not spec.score_cap:
        return backend.core_attention()
    return ModuleSpec(module=SdpaAttention, params={"cap": spec.score_cap, "window": window})


def _mlp_spec(spec: ModelSpec, layer: int, backend: IsotrainSpecProvider) -> ModuleSpec:
    if spec.has_experts(layer):
        experts = get_moe_module_spec_for_backend(
            backend=backend, num_experts=spec.experts, moe_grouped_gemm=False, moe_use_legacy_grouped_gemm=False
        )
        experts.submodules.router = partial(Router, spec)
        return experts
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(),
            activation_func=backend.activation_func() if spec.activation == "silu" else GeGlu,
            linear_fc2=backend.row_parallel_linear(),
        ),
    )
