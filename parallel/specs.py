"""What a model and a cluster are, as plain values: no weights, no torch, no process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SpecError(ValueError):
    """A config.json that describes no model we know; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for rows longer than a model was first trained on.

    ``kind``: ``linear`` (Chen et al. 2023, arXiv:2306.15595), ``llama3`` (arXiv:2407.21783, section 3.4.3, and the
    reference code of Llama 3.1) or ``yarn`` (Peng et al. 2023, arXiv:2309.00071). Frequencies that turn more than
    ``fast`` times over ``original_positions`` stay, those that turn less than ``slow`` times are divided by ``factor``.
    ``score_factor`` multiplies the attention scores (yarn's temperature).
    """

    kind: str
    factor: float
    original_positions: int = 0
    slow: float = 1.0
    fast: float = 4.0
    whole_turns: bool = True
    score_factor: float = 1.0


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values are made of one small latent vector per token (arXiv:2405.04434, section 2.1).

    ``query_rank`` and ``latent_rank``: widths of the latents of queries (0: queries have none) and of keys and values.
    A head's queries and keys have ``plain_dim`` features that do not turn with the position and ``rotary_dim`` that do;
    all heads share the rotary features of a key. A head's values have ``value_dim``. ``interleaved``: the two features
    of a rotary pair lie side by side, not half a vector apart.
    """

    query_rank: int
    latent_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    interleaved: bool = True

    @property
    def key_dim(self) -> int:
        """Features of a head's queries and keys."""
        return self.plain_dim + self.rotary_dim


@dataclass(frozen=True)
class Routing:
    """How a router chooses experts, where it is not the plain choice of the largest logits.

    ``score``: ``softmax`` over all experts, or ``sigmoid`` of each. Experts are chosen among the ``chosen_groups`` of
    ``groups`` equal groups whose ``best_of_group`` highest scores add up to most. ``bias``: each expert has one, which
    counts for the choice only (arXiv:2408.15664). ``scale`` multiplies the weights of the chosen.
    """

    score: str
    groups: int = 1
    chosen_groups: int = 1
    best_of_group: int = 1
    bias: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder, named as in a Hugging Face ``config.json``.

    Sizes are whole-model sizes (not per rank). ``ffn`` is the width of one dense MLP (gate and up have this many rows
    each); ``expert_ffn`` that of one expert. ``experts == 0`` means a dense model. ``router_aux_loss`` is the
    coefficient of the balancing loss that a run has unless it says otherwise. The first ``dense_layers`` layers have a
    dense MLP instead of experts. ``shared_ffn`` is the width of the experts that see every token, all together.
    ``routing`` None: experts with the largest logits, weighted by softmax.

    ``latent``: attention is latent; then ``head_dim`` is the rotary part of a head only.

    ``windows``: for each layer how many of the last tokens a query sees, its own among them (0: all before it); empty
    where no layer has a window. ``local_rope_theta``: the rotary base of layers with a window, where they have their
    own (0: they have not). ``norm_offset``: norms multiply with ``1 + weight``. ``sandwich_norms``: attention and MLP
    are normed before they are added too. ``embedding_scale`` multiplies embedded tokens. ``score_scale`` multiplies
    the attention scores (0: ``1/sqrt(head_dim)``); ``score_cap`` and ``logit_cap`` bound scores and logits by
    ``cap * tanh(x / cap)`` (0: they do not).
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    normalise_expert_weights: bool = True
    router_aux_loss: float = 0.0
    dense_layers: int = 0
    shared_ffn: int = 0
    routing: Routing | None = None
    latent: LatentAttention | None = None
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0
    windows: tuple[int, ...] = ()
    activation: str = "silu"
    norm_offset: bool = False
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    score_scale: float = 0.0
    score_cap: float = 0.0
    logit_cap: float = 0.0

    @property
    def is_moe(self) -> bool:
        """Whether there are mixtures of experts."""
        return self.experts > 0

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of this layer (from 0) is a mixture of experts."""
        return self.is_moe and layer >= self.dense_layers

    @property
    def attended_dim(self) -> int:
        """Features of a head where attention compares and adds up; latent ones are padded to the widest."""
        return max(self.latent.key_dim, self.latent.value_dim) if self.latent else self.head_dim

    @property
    def dense_mlps(self) -> tuple[int, ...]:
        """Widths of the MLPs that are cut over tensor-parallel ranks; experts are not among them."""
        dense = () if self.is_moe and not self.dense_layers else (self.ffn,)
        return (*dense, *((self.shared_ffn,) if self.shared_ffn else ()))

    def window(self, layer: int) -> int:
        """How many tokens a query of this layer (from 0) sees; 0 where it sees all before it."""
        return self.windows[layer] if self.windows else 0


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a Hugging Face folder.

    Raises:
        SpecError: there is no such file, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"{folder} is no model folder: it has no config.json", "model.path=FOLDER") from error
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise SpecError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{path} holds no JSON object")
    return value


@dataclass(frozen=True)
class ClusterSpec:
    """The machines of a run. ``gpus_per_node`` counts ranks per node (processes, on a CPU).

    ``memory_gib`` is what one rank may use: a GPU's memory, or a rank's fair part of the host's. ``gpu`` names the
    kind. ``found``: how the numbers were found out, in words; empty where they were named. ``profile``: the file of
    what was measured there; empty where nothing was.
    """

    name: str
    nodes: int
    gpus_per_node: int
    device: str = "cpu"
    memory_gib: float = 4.0
    gpu: str | None = None
    found: str = ""
    profile: str = ""

    @property
    def ranks(self) -> int:
        """How many ranks there are at most."""
        return self.nodes * self.gpus_per_node
