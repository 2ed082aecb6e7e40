"""Shape: what of a decoder the estimates need. Any decoder has one, whether isotrain can run it or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.specs import LatentAttention, ModelSpec

ATTENTION_SHARE = 0.085
"""Layers with attention of a hybrid of attention, state spaces and MLPs (Nemotron-H, arXiv:2504.03624: 10 of 118)."""


@dataclass(frozen=True)
class Linear:
    """A matrix product of a layer: ``cut`` is column, row or whole over the tensor-parallel ranks."""

    out: int
    width: int
    cut: str = "column"

    @property
    def parameters(self) -> int:
        """Weights of the whole matrix."""
        return self.out * self.width


@dataclass(frozen=True)
class Shape:
    """Sizes of a whole decoder. ``dense_layers``: how many first layers of a mixture of experts have a plain MLP.

    ``positions``: rows of a learned position table. ``hybrid``: layers are attention, state space or MLP each.
    ``window``: tokens that a query of an average layer sees at most (0: all before it). ``more_residuals``: activations
    of the hidden width that a layer keeps beside four; ``more_kept``: of the MLP's width, beside those of a plain one.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    latent: LatentAttention | None = None
    positions: int = 0
    hybrid: bool = False
    window: int = 0
    more_residuals: int = 0
    more_kept: int = 0

    @property
    def kept_widths(self) -> int:
        """Activations of the MLP's width that a layer keeps: the gate, what it gates, and their product."""
        return (3 if self.gated else 2) + self.more_kept

    @property
    def value_width(self) -> int:
        """Features of all heads' outputs."""
        return self.heads * (self.latent.value_dim if self.latent else self.head_dim)

    @property
    def score_width(self) -> int:
        """Features of all heads' queries."""
        latent = self.latent
        return self.heads * (latent.key_dim if latent else self.head_dim)

    @property
    def key_value_width(self) -> int:
        """Features of keys and values as attention takes them."""
        if self.latent:
            return self.heads * (self.latent.key_dim + self.latent.value_dim)
        return 2 * self.kv_heads * self.head_dim

    def kinds(self) -> dict[str, int]:
        """How many layers of each kind there are: dense, moe, or of a hybrid attention, state and mlp."""
        if self.hybrid:
            attention = max(1, round(self.layers * ATTENTION_SHARE))
            mlp = (self.layers - attention) // 2
            return {"attention": attention, "mlp": mlp, "state": self.layers - attention - mlp}
        if self.experts:
            return {"dense": self.dense_layers, "moe": self.layers - self.dense_layers}
        return {"dense": self.layers}

    def attention_linears(self) -> Iterator[Linear]:
        """The products of attention."""
        if self.latent is None:
            yield Linear((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden)
        else:
            latent = self.latent
            if latent.query_rank:
                yield Linear(latent.query_rank, self.hidden, "whole")
            yield Linear(self.score_width, latent.query_rank or self.hidden)
            yield Linear(latent.latent_rank + latent.rotary_dim, self.hidden, "whole")
            yield Linear(self.heads * (latent.plain_dim + latent.value_dim), latent.latent_rank)
        yield Linear(self.hidden, self.value_width, "row")

    def mlp_linears(self, ffn: int) -> Iterator[Linear]:
        """The products of an MLP: gate and up are one."""
        yield Linear(ffn * (2 if self.gated else 1), self.hidden)
        yield Linear(self.hidden, ffn, "row")

    def state_linears(self) -> Iterator[Linear]:
        """The products of a state space layer (Mamba-2, arXiv:2405.21060: an inner width of twice the hidden one)."""
        yield Linear(4 * self.hidden, self.hidden)
        yield Linear(self.hidden, 2 * self.hidden, "row")

    def linears(self, kind: str) -> list[Linear]:
        """The dense products of a layer of one kind; of experts only the router and what all tokens share."""
        found: list[Linear] = []
        if kind in ("dense", "moe", "attention"):
            found += self.attention_linears()
        if kind in ("dense", "mlp"):
            found += self.mlp_linears(self.ffn)
        if kind == "state":
            found += self.state_linears()
        if kind == "moe":
            found.append(Linear(self.experts, self.hidden, "whole"))
            if self.shared_ffn:
                found += self.mlp_linears(self.shared_ffn)
        return found

    def expert_parameters(self) -> int:
        """Weights of all experts of a layer."""
        return self.experts * sum(one.parameters for one in self.mlp_linears(self.expert_ffn))

    def dense_parameters(self, kind: str, tp: int) -> float:
        """Weights of a layer on one of ``tp`` ranks, without experts; norms are whole on each."""
        linears = self.linears(kind)
        return sum(one.parameters / (1 if one.cut == "whole" else tp) for one in linears) + 2 * self.hidden

    def parameters(self) -> int:
        """Weights of the whole model.

        Example:
            >>> round(Shape(32, 4096, 32, 8, 128, 14336, 128256).parameters() / 1e9, 2)
            8.03
        """
        total = sum(count * self.dense_parameters(kind, 1) for kind, count in self.kinds().items())
        total += self.kinds().get("moe", 0) * self.expert_parameters()
        return int(total + self.hidden * (self.vocab * (1 if self.tied else 2) + self.positions))

    def tokens_seen(self, sequence: int) -> float:
        """Tokens that an average query sees, itself among them.

        Example:
            >>> Shape(1, 8, 1, 1, 8, 8, 8).tokens_seen(100), Shape(1, 8, 1, 1, 8, 8, 8, window=10).tokens_seen(100)
            (50.5, 9.55)
        """
        if not self.window or self.window >= sequence:
            return (sequence + 1) / 2
        return self.window - self.window * (self.window - 1) / 2 / sequence


def shape_of(model: ModelSpec) -> Shape:
    """The shape of a model that isotrain runs."""
    windows = [window for window in model.windows if window]
    return Shape(
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        ffn=model.ffn,
        vocab=model.vocab,
        tied=model.tied_embeddings,
        experts=model.experts,
        experts_per_token=model.experts_per_token,
        expert_ffn=model.expert_ffn,
        shared_ffn=model.shared_ffn,
        dense_layers=model.dense_layers if model.is_moe else 0,
        latent=model.latent,
        window=windows[0] if len(windows) == model.layers else 0,
    )
