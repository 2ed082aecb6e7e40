"""Multi-head latent attention on any topology (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

Queries, keys and values are made of small latents: ``q = W_up norm(W_down x)`` and ``[k, v] = W_up norm(W_down x)``;
some features of a key come straight from ``W_down x``, turn with the position and are the same for all heads.

Under tensor parallelism heads are cut. The down projections are small and held whole: with sequence parallelism each
rank projects its own tokens (so what is gathered are latents, not hidden states, and their weights' gradients are
summed over the group by megatron-core). The rotary part of a key is the trap: every rank uses it for its own heads
only, so its gradient is a share, and is summed on the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.module import MegatronModule

from parallel.specs import ModelSpec

LATENT_EPSILON = 1e-6  # of the latents' norms, whatever the config says of the others


class WholeLinear(torch.nn.Module):
    """A linear that every tensor-parallel rank holds whole: ``[s, b, in] -> ([s, b, out], None)``.

    With sequence parallelism it sees this rank's tokens, and megatron-core sums its gradients.
    """

    def __init__(self, config: Any, width: int, out: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out, width, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias: torch.nn.Parameter | None = None
        self.skip_bias_add = False

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """``hidden @ weight^T``."""
        return torch.nn.functional.linear(hidden, self.weight), None


@dataclass(frozen=True)
class LatentSubmodules:
    """What latent attention is built from: the provider's linears, norm and core attention."""

    column: type
    row: type
    norm: type
    core_attention: type


class LatentSelfAttention(MegatronModule):
    """``[s, b, hidden] -> ([s, b, hidden], None)``, where megatron-core has its self-attention.

    Queries, keys and values are padded with zeros to one width, so that every kernel, and the exchange of context
    parallelism, serve them as they do others.
    """

    def __init__(
        self,
        config: Any,
        submodules: LatentSubmodules,
        layer_number: int,
        spec: ModelSpec,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        assert spec.latent is not None
        self.latent, self.tp_group, self.layer_number = spec.latent, pg_collection.tp, layer_number
        latent, self.heads, self.width = spec.latent, spec.heads // pg_collection.tp.size(), spec.attended_dim
        self.temperature = spec.rope_scaling.score_factor**0.5 if spec.rope_scaling else 1.0
        options = {"config": config, "bias": False, "skip_bias_add": False, "is_expert": False}
        options |= {"init_method": config.init_method, "tp_group": self.tp_group}

        def column(width: int, out: int) -> torch.nn.Module:
            made: torch.nn.Module = submodules.column(width, out, gather_output=False, **options)
            return made

        queries = spec.heads * latent.key_dim
        if latent.query_rank:
            self.linear_q_down = WholeLinear(config, spec.hidden, latent.query_rank)
            self.q_layernorm = submodules.norm(config=config, hidden_size=latent.query_rank, eps=LATENT_EPSILON)
            self.linear_q_up = column(latent.query_rank, queries)
        else:
            self.linear_q = column(spec.hidden, queries)
        self.linear_kv_down = WholeLinear(config, spec.hidden, latent.latent_rank + latent.rotary_dim)
        self.kv_layernorm = submodules.norm(config=config, hidden_size=latent.latent_rank, eps=LATENT_EPSILON)
        self.linear_kv_up = column(latent.latent_rank, spec.heads * (latent.plain_dim + latent.value_dim))
        self.core_attention = submodules.core_attention(
            config=config,
            layer_number=layer_number,
            softmax_scale=spec.score_scale,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.linear_proj = submodules.row(
            spec.heads * latent.value_dim, spec.hidden, input_is_parallel=True, **{**options, "skip_bias_add": True}
        )
        self.checkpoint_core_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, rotary_pos_emb: Any = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend causally.

        Args:
            rotary_pos_emb: the angles of this rank's row ``[s, 1, 1, rotary_dim]``, the second half as the first.
        """
        angles = rotary_pos_emb[..., : self.latent.rotary_dim // 2]
        cos, sin = (each * self.temperature for each in (angles.cos(), angles.sin()))
        query, key, value = self._queries(hidden_states, cos, sin), *self._keys_values(hidden_states, cos, sin)
        if self.checkpoint_core_attention and self.training:
            mixed = tensor_parallel.checkpoint(self._attend, False, query, key, value)
        else:
            mixed = self._attend(query, key, value)
        out, bias = self.linear_proj(mixed)
        return out, bias

    def _queries(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``[s, b, heads, key_dim]`` of this rank's heads, turned."""
        if self.latent.query_rank:
            down, _ = self.linear_q_down(hidden)
            flat, _ = self.linear_q_up(self.q_layernorm(down))
        else:
            flat, _ = self.linear_q(hidden)
        heads = flat.unflatten(-1, (self.heads, self.latent.key_dim))
        plain, rotary = heads.split([self.latent.plain_dim, self.latent.rotary_dim], dim=-1)
        return torch.cat([plain, _turn(rotary, cos, sin, self.latent.interleaved)], dim=-1)

    def _keys_values(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[s, b, heads, key_dim]`` and ``[s, b, heads, value_dim]`` of this rank's heads."""
        latent = self.latent
        down, _ = self.linear_kv_down(hidden)
        compressed, rotary = down.split([latent.latent_rank, latent.rotary_dim], dim=-1)
        rotary = _turn(self._for_all_heads(rotary).unsqueeze(2), cos, sin, latent.interleaved)
        flat, _ = self.linear_kv_up(self.kv_layernorm(compressed))
        heads = flat.unflatten(-1, (self.heads, latent.plain_dim + latent.value_dim))
        plain, value = heads.split([latent.plain_dim, latent.value_dim], dim=-1)
        return torch.cat([plain, rotary.expand(-1, -1, self.heads, -1)], dim=-1), value

    def _for_all_heads(self, rotary: torch.Tensor) -> torch.Tensor:
        """The rotary part of all tokens' keys on every rank; back come the shares of all ranks' heads, summed."""
        if self.config.sequence_parallel:
            whole: torch.Tensor = mappings.gather_from_sequence_parallel_region(rotary, group=self.tp_group)
            return whole
        copied: torch.Tensor = mappings.copy_to_tensor_model_parallel_region(rotary, group=self.tp_group)
        return copied

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``[s, b, heads * value_dim]``."""
        qkv = (torch.nn.functional.pad(each, (0, self.width - each.shape[-1])) for each in (query, key, value))
        mixed = self.core_attention(*qkv).unflatten(-1, (self.heads, self.width))
        return mixed[..., : self.latent.value_dim].flatten(2)


def _turn(features: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn pairs of features (Su et al. 2021, arXiv:2104.09864); queries and keys end up in the same order.

    Args:
        features: ``[s, b, heads, d]``; cos and sin: fp32 ``[s, 1, 1, d / 2]``.
        interleaved: a pair are two neighbours, else features ``i`` and ``i + d / 2``.
    """
    first, second = (features[..., ::2], features[..., 1::2]) if interleaved else features.chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(features.dtype)
